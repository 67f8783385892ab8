"""`distill` from the command line: better or nothing, resumed to the bit, refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import Halfbyte

from halfbyte.formats.checkpoint import read
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.manifest import described
from halfbyte.training import loop
from halfbyte.training.modes import MODES

STORY = (
    "Once upon a time there was a little girl named Lily. She loved to play in the park with her "
    "big red ball. One day, her mom said: look, it is going to rain, we have to go home now. Lily "
    "was sad, but she took her ball and went with her mom. At home they had hot soup, and Lily "
    "told her dad about the birds that she saw. "
)
QUICK = (
    "--steps", "6", "--batch", "2", "--window", "32", "--measure-every", "3", "--threads", "1",
)  # fmt: skip


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{n} {STORY}" for n in range(60)), encoding="utf-8")
    return path


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_out_better_or_says_so(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path, mode: str
) -> None:
    out, held = tmp_path / "out.gguf", tmp_path / "held.txt"
    held.write_text("One day Tim and his dog saw a big tree. " * 40, encoding="utf-8")
    done = halfbyte(
        "distill", stories260k, "-o", out, "--data", stories, "--held-out", held, "--mode", mode,
        "--start", start_of(halfbyte, stories260k, tmp_path), *QUICK, "--json",
    )  # fmt: skip
    assert not (tmp_path / "out.gguf.work" / "new" / "out.gguf").exists() or done.code == 7
    if done.code == 7:
        assert not out.exists()
        assert "nothing was written" in done.err
        return
    assert done.code == 0, done.err
    told = done.document
    assert told["mode"] == mode
    assert not (tmp_path / "out.gguf.work").exists()
    kl = [text["kl"]["mean"] for text in told["texts"]]
    assert kl[0] < told["before"][0]["kl"]["mean"]
    made = described(out)
    assert made["method"] == "distill"
    assert made["measurements"]["texts"][0]["kl"]["mean"] == kl[0]
    assert made["distillation"]["moved"]
    assert fingerprint(read(out)) != fingerprint(read(stories260k))


def start_of(halfbyte: Halfbyte, model: Path, folder: Path) -> Path:
    path = folder / "rtn.gguf"
    assert halfbyte("quantize", model, "-o", path, "--method", "rtn").code == 0
    return path


@pytest.mark.parametrize("mode", ["full", "blockwise"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    halfbyte: Halfbyte,
    stories260k: Path,
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    start = start_of(halfbyte, stories260k, tmp_path)

    def distill(name: str) -> Any:
        return halfbyte(
            "distill", stories260k, "-o", tmp_path / name, "--data", stories, "--mode", mode,
            "--start", start, *QUICK,
        )  # fmt: skip

    assert distill("whole.gguf").code in (0, 7)
    whole = tmp_path / "whole.gguf"
    if not whole.exists():
        whole = tmp_path / "whole.gguf.work" / "new" / "whole.gguf"
    taken = loop._Run._advance
    left = [4]

    def stopped(self: Any) -> bool:
        if left[0] == 0:
            left[0] = 3
            raise KeyboardInterrupt
        left[0] -= 1
        found = taken(self)
        self._save()
        return found

    monkeypatch.setattr(loop._Run, "_advance", stopped)
    for _ in range(20):
        try:
            done = distill("parts.gguf")
        except KeyboardInterrupt:
            continue
        if done.code in (0, 7):
            break
    parts = tmp_path / "parts.gguf"
    if not parts.exists():
        parts = tmp_path / "parts.gguf.work" / "new" / "parts.gguf"
    first, second = (
        {name: q.data.tobytes() for name, q in read(path).tensors()} for path in (whole, parts)
    )
    assert first == second


def test_what_is_better_stays(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    assert halfbyte("quantize", stories260k, "-o", out, "--recipe", "q8_0").code == 0
    before = out.read_bytes()
    done = halfbyte(
        "distill", stories260k, "-o", out, "--data", stories, "--mode", "scales",
        "--start", start_of(halfbyte, stories260k, tmp_path), *QUICK,
    )  # fmt: skip
    assert done.code == 7
    assert "KL" in done.err
    assert out.read_bytes() == before


def test_what_cannot_be_learned_from_is_refused(
    halfbyte: Halfbyte, stories260k: Path, tiny_gemma4: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"

    def refused(*arguments: str | Path) -> str:
        done = halfbyte("distill", stories260k, "-o", out, *QUICK, *arguments)
        assert done.code == 2, done.err
        return done.err

    assert "nothing to learn from" in refused()
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    assert "fill a window" in refused("--data", empty)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "Why?", "response": "So."}), encoding="utf-8")
    assert "chat template" in refused("--data", chats)
    assert "stands in this text" in refused("--data", stories, "--held-out", stories)
    other = tmp_path / "other.gguf"
    assert halfbyte("quantize", tiny_gemma4, "-o", other, "--method", "rtn").code == 0
    assert "vocabulary" in refused("--data", stories, "--start", other)
    eight = tmp_path / "eight.gguf"
    assert halfbyte("quantize", stories260k, "-o", eight, "--recipe", "q8_0").code == 0
    assert "--recipe" in refused("--data", stories, "--start", eight)
    assert "context" in refused("--data", stories, "--window", "100000")


def test_a_budget_that_nothing_fits_is_told(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    done = halfbyte(
        "distill", stories260k, "-o", tmp_path / "out.gguf", "--data", stories,
        "--budget", "1MB", *QUICK,
    )  # fmt: skip
    assert done.code == 3
    assert "--at-once" in done.err


def test_flags_come_from_a_file(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    config = tmp_path / "qat.toml"
    config.write_text(f'data = ["{stories}"]\nstepps = 3\n', encoding="utf-8")
    done = halfbyte("distill", stories260k, "-o", tmp_path / "o.gguf", "--config", config)
    assert done.code == 2
    assert "no flag is called stepps" in done.err
    config.write_text(f'data = ["{stories}"]\nbudget = "1MB"\nwindow = 32\n', encoding="utf-8")
    done = halfbyte("distill", stories260k, "-o", tmp_path / "o.gguf", "--config", config)
    assert done.code == 3, done.err
