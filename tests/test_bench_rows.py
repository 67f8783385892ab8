"""`halfbyte bench`: which forwards a row times, what a token reads, and the document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Halfbyte
from oracle import CONFIGS
from random_model import RandomModel, read_config

from halfbyte.errors import InvalidInputError
from halfbyte.evals.bench import Course, Trial, run, standard, step_bytes, trial_of
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import write_gguf
from halfbyte.specs import recipe_of

ROWS = ["rows@1", "rows@2", "rows@4", "rows@8", "rows@16"]


class Recorder(Course):
    """Keeps what is asked of it; refuses positions that nothing was run for."""

    chunk = 512

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []
        self._there = 0

    def forward(self, position: int, count: int, *, every: bool) -> None:
        assert position <= self._there
        self.asked.append((position, count, every))
        self._there = position + count


def asked(name: str, decode: int = 3) -> list[tuple[int, int, bool]]:
    """The forwards of a trial, without those that warm up."""
    recorder = Recorder()
    (row,) = run(recorder, [trial_of(name)], decode=decode, repeats=1)
    assert row.test == name and row.tokens_per_s == pytest.approx(_tokens(name) / row.median_s)
    return recorder.asked[1:]


def _tokens(name: str) -> int:
    trial = trial_of(name)
    return 1 if trial.kind == "decode" else trial.count


def test_a_row_times_what_its_name_says() -> None:
    assert asked("prefill@1200") == [(0, 512, False), (512, 512, False), (1024, 176, False)]
    assert asked("decode@600") == [
        (0, 512, False),
        (512, 88, False),
        *((600 + i, 1, False) for i in range(3)),
    ]
    assert asked("decode@0") == [(i, 1, False) for i in range(3)]
    assert set(asked("rows@8")) == {(0, 8, True)}


@pytest.mark.parametrize("name", ["prefill", "prefill@", "prefill@0", "rows@0", "decode@-1", "x@4"])
def test_what_is_no_trial_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="no trial"):
        trial_of(name)


def test_what_nobody_asked_for_fits_the_context() -> None:
    names = [trial.name for trial in standard(4160)]
    assert names == ["prefill@128", "prefill@512", "prefill@2048", "decode@0", "decode@4096", *ROWS]
    assert [trial.name for trial in standard(1000)] == [
        "prefill@128",
        "prefill@512",
        "decode@0",
        *ROWS,
    ]
    assert Trial("prefill", 2048) in standard(1000, prefill=[2048])


def read_and_stored(config: dict[str, Any]) -> tuple[int, int]:
    """What a token reads, and all that is stored."""
    model = RandomModel(spec_of(config), recipe_of("bf16"))
    shapes = {tensor.name: tensor.shape for tensor in model.spec.tensors()}
    return step_bytes(model), sum(model.schemes[name].bytes(shapes[name]) for name in shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_a_token_reads_an_embedding_only_as_the_head(tied: bool) -> None:
    config = {**CONFIGS["llama"], "tie_word_embeddings": tied}
    read, stored = read_and_stored(config)
    table = 2 * config["vocab_size"] * config["hidden_size"]
    assert read == stored - (0 if tied else table)


def test_a_token_reads_the_experts_it_goes_through() -> None:
    config = CONFIGS["gemma4-experts"]
    read, stored = read_and_stored(config)
    idle = config["num_experts"] - config["top_k_experts"]
    expert = 2 * 3 * config["moe_intermediate_size"] * config["hidden_size"]
    assert read == stored - config["num_hidden_layers"] * idle * expert


def test_bench_ends_in_one_document(halfbyte: Halfbyte) -> None:
    """The demo, whose context is 4096: everything that fits it, nothing to be asked for."""
    lines = halfbyte("bench", "demo", "--decode", 2).out.splitlines()
    facts = json.loads(lines[-1])
    assert facts["schema"] == "halfbyte.bench/1"
    tests = [row["test"] for row in facts["rows"]]
    assert tests == ["prefill@128", "prefill@512", "prefill@2048", "decode@0", *ROWS]
    for row in facts["rows"]:
        assert set(row) == {"test", "tokens_per_s", "median_s", "n"}
        assert row["tokens_per_s"] > 0 and row["n"] == {"p": 3, "d": 2, "r": 9}[row["test"][0]]
    assert facts["load_s"] > 0 and facts["peak_bytes"] > 0
    assert 0 < facts["step_bytes"] <= facts["weights_bytes"] * 1.5
    bandwidth = facts["read_bandwidth_bytes_per_s"]
    if bandwidth is not None:
        decode_s = facts["rows"][3]["median_s"]
        assert facts["bandwidth_share"] == pytest.approx(facts["step_bytes"] / decode_s / bandwidth)
    for name in tests:
        assert any(name in line for line in lines[:-1])


def test_bench_alone_is_json(halfbyte: Halfbyte) -> None:
    asked = ("--prefill", "16,32", "--depth", "0,64", "--decode", 2, "--json")
    tests = [row["test"] for row in halfbyte("bench", "demo", *asked).document["rows"]]
    assert tests == ["prefill@16", "prefill@32", "decode@0", "decode@64", *ROWS]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prefill", "8k"), "beyond the model's 4096"),
        (("--depth", "4096"), "beyond the model's 4096"),
        (("--synthetic-rates", "0.8"), "no drafter beside"),
        (("--drafter", "demo"), "timed at --synthetic-rates"),
        (("--synthetic-rates", "often"), "no list of numbers"),
    ],
)
def test_what_cannot_be_timed_is_said(
    halfbyte: Halfbyte, arguments: tuple[str, ...], says: str
) -> None:
    outcome = halfbyte("bench", "demo", *arguments)
    assert outcome.code == 2 and says in outcome.err


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A random Gemma 4 of two layers and a random drafter for it."""
    folder = tmp_path_factory.mktemp("pair")
    paths = folder / "model.gguf", folder / "model.drafter.gguf"
    for name, path in zip(("gemma4-1b", "gemma4-1b-assistant"), paths, strict=True):
        config = read_config(name, layers=2)
        config.get("text_config", config)["vocab_size"] = 512
        write_gguf(RandomModel(spec_of(config), recipe_of("q4_0")), path)
    yield paths


def test_rounds_of_drafts_are_timed(halfbyte: Halfbyte, pair: tuple[Path, Path]) -> None:
    """With the drafter beside the model, and with one that is named."""
    model, drafter = pair
    asked = ("--prefill", 8, "--decode", 4, "--depth", "0,32", "--json")
    facts = halfbyte("bench", model, *asked, "--synthetic-rates", "0.8,0.6").document
    rows = {row["test"]: row for row in facts["rows"]}
    for depth in (0, 32):
        row = rows[f"speculate@{depth}"]
        assert row["tokens_per_s"] == pytest.approx(2.4 / row["median_s"]) and row["n"] == 3
    rising = halfbyte("bench", model, "--drafter", drafter, *asked, "--synthetic-rates", "0.6,0.8")
    assert rising.code == 2 and "acceptance rates" in rising.err


def test_the_peak_is_that_of_this_process() -> None:
    """Not of the one that started it: `compare` does, and may hold a model."""
    ballast = bytearray(200_000_000)
    code = "from halfbyte.planner.probe import peak_bytes; print(peak_bytes())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert 1_000_000 < int(out) < len(ballast)
