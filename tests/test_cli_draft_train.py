"""`draft train`, `eval` and `shortlist` on a small trained Llama."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from shutil import copy
from typing import Any

import numpy as np
import pytest
from commandline import Halfbyte

from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import recipe_of
from halfbyte.training import loop
from halfbyte.training.drafting import DraftTask

TEXT = Path(__file__).parents[1] / "src" / "halfbyte" / "evals" / "builtin" / "english.txt"
SMALL = ("--window", 96, "--longest", 48, "--rows", 64, "--threads", 1)


@pytest.fixture(scope="module")
def model(stories260k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("target") / "stories.gguf"
    write_gguf(Quantized(read(stories260k), recipe_of("q4_0")), path)
    return path


def train(halfbyte: Halfbyte, model: Path, out: Path, *options: object) -> dict[str, Any]:
    outcome = halfbyte(
        "draft", "train", model, "-o", out, "--data", TEXT, *SMALL, *options, "--json"
    )
    assert outcome.code == 0, outcome.err
    return outcome.document


def test_a_drafter_is_trained_and_drafts(halfbyte: Halfbyte, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "stories.drafter.gguf"
    made = train(halfbyte, model, out, "--tokens", 600, "--passes", 2)
    assert made["accepted"][0] > made["before"][0] and made["tokens_per_round"] > 1.3
    assert made["steps"] > 15 and made["ended"] == "done"
    assert made["bytes"] == out.stat().st_size
    drafter = read(out)
    assert drafter.spec.drafter is not None
    assert drafter.spec.drafter.target == fingerprint(read(model))
    assert not out.with_name(f"{out.name}.work").exists()
    rated = halfbyte(
        "draft", "eval", model, "--drafter", out, "--text", f"own={TEXT}", "--prompts", 4,
        "--max-tokens", 32, "--rates", "0.8,0.6", "--json",
    )  # fmt: skip
    assert rated.code == 0, rated.err
    rows = rated.document["rows"]
    assert [(row["sampling"], row["drafter"]) for row in rows] == [
        ("greedy", "lookup"), ("greedy", "model"), ("sampled", "lookup"), ("sampled", "model"),
    ]  # fmt: skip
    greedy = rows[1]
    assert greedy["by_position"][0] > 0.2 and greedy["share"] > 0.8
    assert greedy["tokens_per_round"] == pytest.approx(1 + sum(greedy["by_position"]))
    assert len(rated.document["assumed_speedup"]) == 2 and rated.document["drafter"] == "own"
    again = train(
        halfbyte, model, tmp_path / "again.gguf", "--tokens", 300, "--start", out, "--passes", 1
    )
    assert again["before"][0] > 0.5 * made["accepted"][0]


def test_a_stopped_run_ends_in_the_same_bytes(
    halfbyte: Halfbyte, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--tokens", 300, "--passes", 1, "--recipe", "q8_0")
    train(halfbyte, model, tmp_path / "whole.gguf", *options)
    # A clock on which every look is minutes later: it is saved at every step.
    monkeypatch.setattr(loop, "monotonic", count(0, 100).__next__)
    learn, steps = DraftTask.learn, count()

    def stopping(self: DraftTask, step: int) -> Any:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return learn(self, step)

    monkeypatch.setattr(DraftTask, "learn", stopping)
    out = tmp_path / "stopped.gguf"
    arguments = ("draft", "train", model, "-o", out, "--data", TEXT, *SMALL, *options, "--json")
    assert halfbyte(*arguments).code == 130
    assert not out.exists()
    outcome = halfbyte(*arguments)
    assert outcome.code == 0, outcome.err
    one, other = (read(tmp_path / f"{name}.gguf") for name in ("whole", "stopped"))
    for (name, mine), (_, its) in zip(one.tensors(), other.tensors(), strict=True):
        assert np.array_equal(mine.data, its.data), name


def test_what_a_target_says_most(halfbyte: Halfbyte, model: Path, tmp_path: Path) -> None:
    place = tmp_path / "short.json"
    arguments = ("draft", "shortlist", model, "--data", TEXT, "--tokens", 1200)
    found = halfbyte(*arguments, "--size", 128, "-o", place, "--json").document
    assert len(found["tokens"]) == 128 == len(set(found["tokens"]))
    assert 0.5 < found["coverage"] < 1 and found["different"] <= found["vocab"] == 512
    assert json.loads(place.read_text())["tokens"] == found["tokens"]
    more = halfbyte(*arguments, "--coverage", 0.9, "--json").document
    assert more["coverage"] >= 0.9 and len(more["tokens"]) % 64 == 0
    made = train(
        halfbyte, model, tmp_path / "short.gguf", "--tokens", 300, "--shortlist", place,
        "--hidden", 32, "--passes", 1,
    )  # fmt: skip
    drafter = read(tmp_path / "short.gguf").spec.drafter
    assert drafter is not None and drafter.head_rows == 128
    assert made["steps"] > 0
    exported = halfbyte(
        "export", tmp_path / "short.gguf", "--to", "gguf", "-o", tmp_path / "x.gguf"
    )
    assert exported.code == 1 and "shortlist" in exported.err
    place.write_text("{}")
    refused = halfbyte(*("draft", "train", model, "-o", tmp_path / "y.gguf", "--data", TEXT),
        "--shortlist", place)  # fmt: skip
    assert refused.code == 4 and "no shortlist" in refused.err


def test_what_cannot_be_trained_is_refused(
    halfbyte: Halfbyte, model: Path, stories260k: Path, tmp_path: Path
) -> None:
    def error(*options: object, out: str = "x.gguf") -> str:
        outcome = halfbyte("draft", "train", model, "-o", tmp_path / out, "--data", TEXT, *options)
        assert outcome.code in (2, 3), outcome.err
        return outcome.err

    assert "beyond the context" in error("--window", 4096)
    assert "width 128 beside a target of 64" in error("--hidden", 128)
    assert "layers for a target" in error("--layers", 9)
    assert "written as X.gguf" in error(out="folder")
    copy(model, tmp_path / "plain.gguf")
    assert "no drafter" in error("--start", tmp_path / "plain.gguf")
