"""Calibration data: windows from texts and conversations, and what must never be among them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import read
from halfbyte.quantizer.calibrate import Calibration, Reader, Sampling
from halfbyte.text.overlap import fingerprint, shared
from halfbyte.text.tokenizer import Tokenizer

SAMPLING = Sampling(samples=6, window=64, seed=1)


@pytest.fixture(scope="module")
def gemma(tiny_gemma4: Path) -> tuple[Reader, Tokenizer]:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    return Reader(assets), Tokenizer(assets)


def text(path: Path, seed: int, words: int = 4000) -> Path:
    chance = np.random.default_rng(seed)
    vocabulary = ["".join(chance.choice(list("abcdefgh"), 5)) for _ in range(200)]
    path.write_text(" ".join(chance.choice(vocabulary, words)), encoding="utf-8")
    return path


def test_windows_are_drawn_by_the_seed(gemma: tuple[Reader, Tokenizer], tmp_path: Path) -> None:
    reader, tokenizer = gemma
    paths = [text(tmp_path / "a.txt", 0), text(tmp_path / "b.txt", 1)]
    found = reader.read(paths, SAMPLING)
    assert [len(window) for window in found.windows] == [64] * 6
    assert all(window[0] == tokenizer.bos_id for window in found.windows)
    assert found == reader.read(paths, SAMPLING)
    other = reader.read(paths, Sampling(samples=6, window=64, seed=2))
    assert found.windows != other.windows
    assert list(found.files) == ["a.txt", "b.txt"]
    # Half of them are of each file.
    contents = [path.read_text() for path in paths]
    sides = [[tokenizer.decode(w[2:12]).strip() in c for c in contents] for w in found.windows]
    assert sides == [[True, False]] * 3 + [[False, True]] * 3


def test_conversations_go_through_the_template(
    gemma: tuple[Reader, Tokenizer], tmp_path: Path
) -> None:
    reader, tokenizer = gemma
    lines = [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(60)]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    window = reader.read([path], Sampling(samples=1, window=256)).windows[0]
    shown = tokenizer.decode(window, skip_special=False)
    assert shown.startswith("<bos><|turn>user\nQuestion ") and "<|turn>model\nAnswer " in shown
    assert list(window).count(tokenizer.bos_id or -1) == 1
    # Shuffled: not as they stand in the file.
    numbers = [int(part.split("?")[0]) for part in shown.split("Question ")[1:-1]]
    assert numbers != sorted(numbers) and len(set(numbers)) == len(numbers)


def test_a_model_without_a_template_reads_them_as_text(stories260k: Path, tmp_path: Path) -> None:
    assets = read(stories260k).assets
    assert assets is not None and assets.template is None
    path = tmp_path / "chats.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Once upon a time"}]}\n' * 20)
    window = Reader(assets).read([path], Sampling(samples=1, window=40)).windows[0]
    assert Tokenizer(assets).decode(window).count("Once upon a time\n\n") >= 4


def test_some_windows_are_of_every_file() -> None:
    windows = [[file, number] for file, count in enumerate((5, 5, 6)) for number in range(count)]
    made = Calibration(windows=windows, files={}, sampling=Sampling(samples=16, window=2))
    assert [file for file, _ in made.some(3)] == [0, 1, 2]
    assert len({tuple(window) for window in made.some(7)}) == 7
    assert [*made.some(16)] == [*made.some(99)] == windows


def test_too_short_says_how_short(gemma: tuple[Reader, Tokenizer], tmp_path: Path) -> None:
    path = text(tmp_path / "a.txt", 0, words=100)
    with pytest.raises(InvalidInputError, match=r"a\.txt: has \d+ windows of 64 tokens; 500"):
        gemma[0].read([path], Sampling(samples=500, window=64))


def test_the_text_that_is_measured_is_refused(
    gemma: tuple[Reader, Tokenizer], tmp_path: Path
) -> None:
    """Whether it is the file itself, is a part of it, or has it as a part."""
    reader, _ = gemma
    measured, other = text(tmp_path / "measured.txt", 0), text(tmp_path / "other.txt", 1)
    content = measured.read_text()
    part, whole = tmp_path / "part.txt", tmp_path / "whole.txt"
    part.write_text(content[: len(content) // 2])
    whole.write_text(other.read_text() + content)
    sampling = Sampling(samples=40, window=64)
    for path in (measured, part, whole):
        with pytest.raises(InvalidInputError, match="what the model was calibrated on stands in"):
            reader.refuse(reader.read([path], sampling), [other, measured])
    reader.refuse(reader.read([other], sampling), [measured])


def test_a_fingerprint_estimates_what_is_shared() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 40_000).tolist()
    known = fingerprint([ids[i : i + 500] for i in range(0, 40_000, 500)])
    assert len(known) == 256 * 16
    assert shared(known, ids) == 1.0
    assert shared(known, ids[:10_000]) == pytest.approx(0.25, abs=0.08)
    assert shared(known, ids[10:10_010:2]) == 0.0
    assert fingerprint([[1, 2, 3]]) == "" and shared("", ids) == 0.0
