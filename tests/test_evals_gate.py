"""Gates: what they may ask, what misses them, what our own ask of which model, what would help."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, nan
from pathlib import Path

import numpy as np
import pytest
from oracle import CONFIGS

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import Fidelity, summarize
from halfbyte.evals.gate import Check, Gate, default_gate, misses, read_gate
from halfbyte.evals.remedies import Making, remedies
from halfbyte.evals.tasks.outcome import Outcome, TaskResult
from halfbyte.evals.tasks.outcome import summarize as summarize_task
from halfbyte.families import spec_of
from halfbyte.specs import SCHEMES, KVType, Scheme, recipe_of

GATE = "max_kl_mean = 0.1\nmin_same_top1 = 0.9\nmax_perplexity_increase = 0.05\n"
SPEC = spec_of(CONFIGS["gemma4-unified"])


def measured(*, loss: float, kl: float, same: float, name: str = "books") -> Fidelity:
    """Two tokens whose reference has perplexity e."""
    return summarize(name, np.array([[loss, 1.0, kl, same]] * 2))


def task(*rights: tuple[bool, bool]) -> TaskResult:
    """A task of items by whether the model and the reference are right."""
    ours, theirs = ([Outcome(right=r, answer="", numbers={"loops": 0.5}) for r in column]
                    for column in zip(*rights, strict=True))  # fmt: skip
    return summarize_task("arc", "choices", ours, theirs)


def gate_of(tmp_path: Path, content: str) -> Gate:
    path = tmp_path / "gate.toml"
    path.write_text(content, encoding="utf-8")
    return read_gate(path)


def test_a_gate_is_kept_and_missed(tmp_path: Path) -> None:
    gate = gate_of(tmp_path, GATE)
    assert misses(gate, [measured(loss=1.04, kl=0.1, same=1.0)]) == []
    bad = measured(loss=1.2, kl=0.2, same=0.0)
    assert [(miss.number, miss.measured, miss.threshold) for miss in misses(gate, [bad])] == [
        ("kl_mean", 0.2, 0.1),
        ("same_top1", 0.0, 0.9),
        ("perplexity_increase", pytest.approx(exp(0.2) - 1), 0.05),
    ]
    assert misses(gate, [measured(loss=1.0, kl=nan, same=1.0)])[0].number == "kl_mean"
    assert misses(Gate(every={"max_perplexity": 2.0}), [bad])[0] == Check(
        text="books", number="perplexity", limit="max", threshold=2.0, measured=bad.perplexity
    )


def test_a_text_of_its_own_thresholds(tmp_path: Path) -> None:
    gate = gate_of(tmp_path, GATE + "[text.chinese]\nmax_kl_mean = 0.3\n")
    english = measured(loss=1.0, kl=0.2, same=1.0, name="english")
    chinese = measured(loss=1.0, kl=0.2, same=0.5, name="chinese")
    found = [(miss.text, miss.number) for miss in misses(gate, [english, chinese])]
    assert found == [("english", "kl_mean"), ("chinese", "same_top1")]
    with pytest.raises(InvalidInputError, match="the text 'chinese', which was not measured"):
        misses(gate, [english])


def test_what_is_asked_of_a_task(tmp_path: Path) -> None:
    gate = gate_of(tmp_path, "[task.arc]\nmax_flip_rate = 0.3\nmax_score_drop = 0.2\n")
    good = task((True, True), (False, False), (True, True), (True, False))
    bad = task((False, True), (True, False), (True, True), (True, True))
    assert misses(gate, [], [good]) == []
    assert [miss.number for miss in misses(gate, [], [bad])] == ["flip_rate"]
    numbers = gate_of(tmp_path, "[task.arc]\nmax_loops = 0.4\nmin_score = 0.5\n")
    assert [miss.number for miss in misses(numbers, [], [bad])] == ["loops"]
    unknown = gate_of(tmp_path, "[task.arc]\nmax_hops = 1\n")
    with pytest.raises(InvalidInputError, match="max_hops of arc"):
        misses(unknown, [], [bad])
    with pytest.raises(InvalidInputError, match="the task 'arc'"):
        misses(gate, [measured(loss=1.0, kl=0.0, same=1.0)])


def test_a_gate_that_cannot_be_applied(tmp_path: Path) -> None:
    wrong = ("max_kl_typo = 1", "min_kl_mean = 1", "max_kl_mean = 'x'", "max_kl_mean = true", "")
    wrong += ("= 3", "text = 3", "[text]\nmax_kl_mean = 3", "[text.x]\nmax_flip_rate = 1")
    wrong += ("[task.x]\nflip_rate = 1", "[text.x]\n[text.x]")
    for content in wrong:
        with pytest.raises(InvalidInputError):
            gate_of(tmp_path, content)
    with pytest.raises(InvalidInputError, match="reference"):
        misses(Gate(every={"max_kl_mean": 1.0}), [summarize("alone", np.ones((2, 1)))])


def test_a_miss_says_by_how_much() -> None:
    miss = Check(text="chinese", number="kl_mean", limit="max", threshold=0.07, measured=0.0851)
    assert miss.sentence == "kl_mean on chinese is 0.0851, 0.015 beyond 0.07"


def schemes_of(recipe: str) -> Mapping[str, Scheme]:
    return {t.name: recipe_of(recipe).scheme_for(t.name, t.shape) for t in SPEC.tensors()}


def test_our_own_gates_are_stricter_for_more_bits() -> None:
    recipes = ("f32", "bf16", "q8_0", "q4_0", "q4_0-pure")
    found = [default_gate(SPEC, schemes_of(recipe)).every["max_kl_mean"] for recipe in recipes]
    assert found == [0.001, 0.001, 0.003, 0.13, 0.2]


def test_a_large_embedding_does_not_decide_about_the_layers() -> None:
    """Most weights of a small model may be its embedding."""
    schemes = {n: SCHEMES["q6_k" if n == "embed.weight" else "q4_0"] for n in schemes_of("q4_0")}
    assert default_gate(SPEC, schemes).every["max_kl_mean"] == 0.13


MISSED = [Check(text="chinese", number="kl_mean", limit="max", threshold=0.1, measured=1.0)]


def told(recipe: str, method: str | None, kv: KVType = "bf16") -> str:
    made = Making(
        spec=SPEC, schemes=schemes_of(recipe), kv=kv, rounds_activations=False, method=method
    )
    return "\n".join(remedies(made, MISSED))


def test_what_would_help_follows_from_how_a_model_was_made() -> None:
    assert told("q4_0-pure", "rtn").startswith("--method search")
    assert "--recipe q4_0: embedding and head in q6_k" in told("q4_0-pure", "rtn")
    assert told("q4_0", "search").startswith("--method gptq")
    assert "--recipe q4_0" not in told("q4_0", "search")
    assert told("q4_0", "gptq").startswith("--method yaqa")
    assert "some like chinese" in told("q4_0", "yaqa") and "--method" not in told("q4_0", "yaqa")
    assert told("q4_0", "gptq", "q8_0").startswith("--kv bf16")
    assert told("bf16", None) == ""
    made = Making(
        spec=SPEC, schemes=schemes_of("q8_0"), kv="bf16", rounds_activations=True, method="rtn"
    )
    assert remedies(made, MISSED) == [
        "--dtype f32 tells how much of it is the rounding of activations in this run"
    ]
    assert remedies(made, []) == []
