"""Tasks: each judge by hand-made answers, each run against a naive computation or a real model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import oracle_logits
from transformers import AutoModelForCausalLM

from halfbyte.engine.sequence import Completion
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.evals.tasks import (
    answers,
    choices,
    gsm8k,
    humaneval,
    needle,
    read_task,
    toolcalls,
)
from halfbyte.evals.tasks.confined import passes
from halfbyte.evals.tasks.likelihood import Ending
from halfbyte.evals.tasks.outcome import Outcome, flips, mcnemar, summarize
from halfbyte.evals.tasks.repetition import loops, repeated
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.evals.texts import OWN_TEXTS
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.load import load
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import recipe_of
from halfbyte.text.tools import ToolCall

TEMPLATES = Path(__file__).parent / "templates"


def outcome(right: bool, answer: str = "", **numbers: float) -> Outcome:
    return Outcome(right=right, answer=answer, numbers=numbers)


def ending(*log_p: float, written: bool = False) -> Ending:
    ids = np.arange(len(log_p))
    return Ending(ids, np.array(log_p), ids if written else ids + 1)


def test_flips_count_both_ways() -> None:
    theirs = [outcome(True, "a"), outcome(True, "b"), outcome(False, "c"), outcome(False, "d")]
    ours = [outcome(True, "a"), outcome(False, "x"), outcome(True, "y"), outcome(False, "z")]
    found = summarize("t", "choices", ours, theirs)
    assert found.score == found.reference_score == 0.5
    assert found.flips is not None
    assert (found.flips.to_wrong, found.flips.to_right, found.flips.rate) == (1, 1, 0.5)
    assert found.flips.changed_answers == 0.75 and found.flips.p_value == 1.0
    assert flips(theirs, theirs).rate == 0.0


@pytest.mark.parametrize(
    ("one", "other", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 2 / 32), (9, 1, 22 / 1024), (7, 7, 1.0), (20, 0, 2**-19)],
)
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int, p: float) -> None:
    assert mcnemar(one, other) == mcnemar(other, one) == p


def test_numbers_are_means_over_the_items_that_have_them() -> None:
    found = summarize("t", "x", [outcome(True, "", a=1.0, b=4.0), outcome(False, "", a=0.0)])
    assert found.numbers == {"a": 0.5, "b": 4.0} and found.flips is None


def test_choices_are_judged_per_byte_and_endings_as_they_are() -> None:
    question = choices.Item([("q", "no"), ("q", "certainly")], 1, per_byte=True)
    found = choices.judge(question, [ending(-2.0), ending(-2.0, -2.5)])
    assert found.right and found.answer == "1"
    assert found.numbers["gold"] == pytest.approx(np.exp(-2.5) / (1 + np.exp(-2.5)))
    schema = choices.Item([("a", "end"), ("b", "end")], 1, per_byte=False)
    assert not choices.judge(schema, [ending(-2.0), ending(-4.5)]).right
    cloze = choices.Item([("a", "word")], 0, per_byte=False)
    assert choices.judge(cloze, [ending(-1.0, -3.0, written=True)]).right
    assert choices.judge(cloze, [ending(-1.0, -3.0)]).numbers == {"nats": 2.0}


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("It is 3.\n#### 18", 18),
        ("#### $1,234.50", Fraction("1234.5")),
        ("so 2 + 2 = 4", 4),
        ("he has -7 left", -7),
        ("#### 18.00", 18),
        ("4 of 5, that is 3/4", Fraction(3, 4)),
        ("12 #### unknown", 12),
        ("1/0", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_number_that_an_answer_ends_in(answer: str, number: int | None) -> None:
    assert gsm8k.number_in(answer) == number


def test_a_number_is_right_however_it_is_written() -> None:
    assert gsm8k.judge("That makes $1,200.", Fraction(1200)).right
    assert gsm8k.judge("nothing", Fraction(3)).numbers == {"answered": 0.0}


DOUBLE = humaneval.Problem(
    'import math\n\n\ndef double(x):\n    """Twice x."""\n',
    "double",
    "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n",
)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("    return 2 * x\n", True),
        ("    return 2 * x\n\nprint(double(4)\n", True),
        ("Here:\n```python\ndef double(x):\n    return math.trunc(x + x)\n```\nDone.", True),
        ("def double(x):\n    return x + x", True),
        ("    return x\n", False),
        ("    return (\n", False),
        ("    import sys\n    sys.exit(0)\n", False),
        ("", False),
    ],
)
def test_functions_are_judged_by_their_tests(answer: str, right: bool) -> None:
    assert humaneval.judge(DOUBLE, answer).right == right


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "x = bytearray(1 << 31)",
        "open('big', 'wb').write(bytes(1 << 22))",
        "files = [open('/dev/null') for _ in range(100)]",
        "import os; assert 'HOME' in os.environ",
        "print('passed'); raise SystemExit",
        "import numpy",
    ],
)
def test_programs_are_confined(program: str) -> None:
    assert not passes(program, seconds=1)


def test_a_program_that_ends_well_passes() -> None:
    assert passes("print('much ' * 1000)\nopen('small', 'w').write('fine')")


def test_code_is_not_run_without_leave(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl.gz"
    row = {"prompt": DOUBLE.prompt, "entry_point": "double", "test": DOUBLE.test}
    path.write_bytes(gzip.compress(json.dumps(row).encode()))
    with pytest.raises(InvalidInputError, match="--allow-code"):
        read_task("humaneval", path, Settings())
    assert read_task("humaneval", path, Settings(allow_code=True))


def test_repetition_and_loops() -> None:
    assert repeated([1, 2, 3]) == 0.0 and repeated(range(50)) == 0.0
    assert repeated([5] * 14) == pytest.approx(10 / 11)
    story = [*range(100, 140)]
    assert loops([*story, *[7] * 24]) and not loops([*story, *[7] * 23])
    assert loops([*story, *([1, 2, 3, 4, 5, 6, 7, 8] * 4)[:-3]])
    assert loops([*range(12)] * 3) and not loops([*range(12), *range(12)])
    assert not loops([]) and not loops(story)


def finished(ids: Sequence[int], reason: Any = "stop") -> Completion:
    return Completion(
        cached_tokens=0,
        token_ids=tuple(ids),
        finish_reason=reason,
        prompt_tokens=1,
        decode_tokens=0,
        prefill_s=0.0,
        decode_s=0.0,
    )


def test_answers_beside_the_references() -> None:
    theirs = answers.judge(finished([1, 2, 3, 4]), "text")
    ours = answers.judge(finished([1, 2, 9], "length"), "other")
    assert theirs.right and not ours.right and ours.numbers["tokens"] == 3
    found = answers.compare(ours, theirs, [False, True, False, False, True])
    assert found == {"stops_early": 1.0, "agreed": 0.5, "stops_there": 1.0}
    same = answers.compare(theirs, theirs, [False] * 5)
    assert same == {"stops_early": 0.0, "agreed": 1.0, "stops_there": 0.0}
    assert "stops_there" not in answers.compare(theirs, ours, [False] * 4)


LAMP = {
    "name": "set_lamp",
    "parameters": {
        "type": "object",
        "properties": {
            "room": {"type": "string"},
            "level": {"type": "integer"},
            "colours": {"type": "array", "items": {"enum": ["red", "green"]}},
        },
        "required": ["room"],
    },
}


@pytest.mark.parametrize(
    ("arguments", "valid"),
    [
        ({"room": "hall"}, True),
        ({"room": "hall", "level": 3, "colours": ["red"]}, True),
        ({"room": "hall", "level": 3.0}, True),
        ({"room": "hall", "level": 3.5}, False),
        ({"room": "hall", "level": True}, False),
        ({"room": "hall", "colours": ["blue"]}, False),
        ({"room": 4}, False),
        ({"level": 3}, False),
        ({"room": "hall", "house": "mine"}, False),
    ],
)
def test_arguments_must_fit_their_schema(arguments: Mapping[str, Any], valid: bool) -> None:
    offer = toolcalls.Offer([], [{"type": "function", "function": LAMP}], None)
    found = toolcalls.judge(offer, [ToolCall("set_lamp", dict(arguments))])
    assert found.right == valid and found.numbers["fit"] == valid


def test_calls_must_be_of_tools_that_exist_and_as_expected() -> None:
    expected = ToolCall("set_lamp", {"room": "hall"})
    offer = toolcalls.Offer([], [LAMP], expected)
    right = ToolCall("set_lamp", {"room": "hall", "level": 1})
    other = ToolCall("set_lamp", {"room": "attic"})
    foreign = ToolCall("explode", {})
    assert toolcalls.judge(offer, [other, right]).right
    assert not toolcalls.judge(offer, [other]).right
    assert toolcalls.judge(offer, [right, foreign]).numbers["known"] == 0.0
    assert toolcalls.judge(offer, []).numbers == {"called": 0.0}


@pytest.fixture(scope="module")
def subject(tiny_gemma4: Path) -> Callable[[str], Subject]:
    source = read(tiny_gemma4)

    @cache
    def made(recipe: str) -> Subject:
        stored = Quantized(source, recipe_of(recipe), method="rtn")
        assert source.assets is not None
        return Subject(load(stored, ReferenceOps(exact_rows=False)), source.assets, "f32")

    return made


def test_likelihoods_are_those_of_reading_everything_anew(
    subject: Callable[[str], Subject], tiny_gemma4: Path
) -> None:
    """Sequences that share beginnings, in an order that makes the cache go back and forth."""
    theirs = AutoModelForCausalLM.from_pretrained(tiny_gemma4, dtype=torch.float32).eval()
    base = np.random.default_rng(5).integers(10, 8000, 90).tolist()
    sequences = [(base, 80), ([*base[:80], 7, 8, 9], 80), (base[:5], 1), (base[:50], 49), (base, 3)]
    likelihood = subject("f32").likelihood(100)
    for ids, start in sequences:
        rows = torch.from_numpy(oracle_logits(theirs, ids)[start - 1 : -1]).double().log_softmax(-1)
        expected = rows[torch.arange(len(ids) - start), torch.tensor(ids[start:])]
        found = likelihood(ids, start)
        np.testing.assert_allclose(found.log_p, expected.numpy(), atol=1e-3)
        np.testing.assert_array_equal(found.likeliest, rows.argmax(-1).numpy())


def test_a_seam_may_lie_within_a_token(subject: Callable[[str], Subject]) -> None:
    asked = subject("f32")
    split = asked.split("The answer is un", "til tomorrow")
    whole = asked.tokenizer.encode_raw("The answer is until tomorrow")
    assert list(split.ids) == whole and 1 <= split.start < len(whole)
    assert asked.tokenizer.decode(split.ids[split.start :]).endswith("tomorrow")
    assert asked.split("", "word").start == 1


ICL = ("arc_easy", "piqa", "winogrande", "boolq", "lambada_openai")


@pytest.mark.parametrize("name", ICL)
def test_choices_of_every_kind_are_asked(
    subject: Callable[[str], Subject], shared_data: Path, name: str
) -> None:
    task = read_task("choices", shared_data / "eval" / "icl" / f"{name}.jsonl", Settings(limit=3))
    exact = task.run(subject("f32"), None)
    assert len(exact) == 3 and exact == task.run(subject("f32"), exact)
    assert all(0 <= o.numbers.get("gold", 0) <= 1 for o in exact)


def test_generated_answers_are_the_same_twice_and_stop_where_the_reference_does(
    subject: Callable[[str], Subject],
) -> None:
    task = read_task("answers", None, Settings(limit=3, max_tokens=24))
    exact = task.run(subject("f32"), None)
    again = task.run(subject("f32"), exact)
    assert [o.token_ids for o in again] == [o.token_ids for o in exact]
    for found in again:
        assert found.numbers["agreed"] == 1.0 and found.numbers["stops_early"] == 0.0
        assert found.numbers.get("stops_there", 1.0) == 1.0


def test_word_problems_are_answered(subject: Callable[[str], Subject], shared_data: Path) -> None:
    path = shared_data / "eval" / "gsm8k" / "test.jsonl"
    found = read_task("gsm8k", path, Settings(limit=2, max_tokens=8)).run(subject("f32"), None)
    assert len(found) == 2 and all("answered" in o.numbers for o in found)


def test_tools_are_offered_in_the_model_s_own_words(tiny_gemma4: Path) -> None:
    """Its own template has no place for tools; it gets one that has."""
    source = read(tiny_gemma4)
    template = (TEMPLATES / "gemma4.jinja").read_text(encoding="utf-8")
    assert source.assets is not None
    assets = replace(source.assets, template=template)
    asked = Subject(load(source, ReferenceOps(exact_rows=False)), assets, "f32")
    found = read_task("tools", None, Settings(limit=2, max_tokens=8)).run(asked, None)
    assert [o.numbers["called"] for o in found] == [0.0, 0.0]


def test_needles_are_at_their_depth_and_asked_for(subject: Callable[[str], Subject]) -> None:
    tokenizer = subject("f32").tokenizer
    straw = tokenizer.encode(OWN_TEXTS["english"].read_text(encoding="utf-8"), special=False)
    needles = [*needle.needles_up_to(1024)]
    assert [n.length for n in needles] == [512] * 10 + [1024] * 10
    for hidden in (needles[0], needles[9], needles[15]):
        splits = needle.hidden(hidden, straw, tokenizer)
        sentence = f"{hidden.question} {hidden.numbers[0]}."
        text = tokenizer.decode(splits[0].ids[: splits[0].start])
        assert text.count(sentence) == 1 and text.endswith(f"\n{hidden.question}")
        assert text.index(sentence) / len(text) == pytest.approx(hidden.depth, abs=0.1)
        assert max(len(split.ids) for split in splits) in range(
            hidden.length - 3, hidden.length + 1
        )
        endings = {tokenizer.decode(split.ids[split.start :]).strip() for split in splits}
        assert endings == {f"{number}." for number in hidden.numbers}


def test_a_needle_is_found_when_its_number_is_the_likeliest() -> None:
    hidden = next(needle.needles_up_to(512))
    likely, other = ending(-1.0, -1.0, written=True), ending(-3.0, -3.0)
    assert needle.judge(hidden, [likely, *[other] * 7]).numbers == {"written": 1.0, "nats": 1.0}
    missed = needle.judge(hidden, [other, *[likely] * 7])
    assert not missed.right and missed.answer == str(hidden.numbers[1])


def test_needles_are_searched(subject: Callable[[str], Subject]) -> None:
    found = read_task("needle", None, Settings(limit=2, longest=512)).run(subject("f32"), None)
    assert len(found) == 2 and all(o.numbers["nats"] > 0 for o in found)
    with pytest.raises(InvalidInputError, match="at least 512"):
        read_task("needle", None, Settings(longest=300)).run(subject("f32"), None)


BAD = {
    "choices": ['{"query": "q", "choices": ["a"], "gold": 0}', '{"query": "q"}', "{}"],
    "gsm8k": ['{"question": "q", "answer": "5"}', '{"answer": "#### 5"}'],
    "answers": ['{"messages": [{"role": "system", "content": "x"}]}', '{"question": "q"}'],
    "tools": ['{"prompt": "q"}', '{"prompt": "q", "tools": [{"function": {}}]}'],
}


@pytest.mark.parametrize(
    ("kind", "line"), [(k, line) for k, lines in BAD.items() for line in lines]
)
def test_lines_that_are_no_items(tmp_path: Path, kind: str, line: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidInputError, match=r"items\.jsonl:1"):
        read_task(kind, path, Settings())


def test_tasks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no task"):
        read_task("chess", None, Settings())
    for kind in ("choices", "gsm8k", "humaneval"):
        with pytest.raises(InvalidInputError, match="needs a file"):
            read_task(kind, None, Settings())
    damaged = tmp_path / "x.jsonl.gz"
    damaged.write_bytes(gzip.compress(b"{}\n" * 1000)[:30])
    for path in (damaged, tmp_path / "absent.jsonl"):
        with pytest.raises(HalfbyteError, match=path.name):
            read_task("choices", path, Settings())
