"""Calibration data: texts and conversations as windows of token ids.

A `.jsonl` file holds conversations, which go through the model's own chat template; any other file
is plain text. Several files are mixed in equal shares. The passages of a text, or conversations,
are shuffled by the seed, put one after the other and cut into windows, each with the BOS that the
model wants in front; no more of a file is encoded than is taken.

What it is not: a measure of anything. A model must not be measured on what it was calibrated on, so
the windows leave a fingerprint (`text/overlap.py`) for those who measure.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.formats.conversations import messages_of
from halfbyte.formats.documents import content_of
from halfbyte.formats.lines import Line, read_lines
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.overlap import fingerprint, shared
from halfbyte.text.tokenizer import Tokenizer

CONVERSATIONS = (".jsonl", ".jsonl.gz")
# A text of which so much was calibrated on is no test; less is chance, and common phrases.
TOLERATED = 0.01
PASSAGE = 16  # characters of a passage for each token of a window


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`samples` windows of `window` tokens, drawn by `seed`."""

    samples: int = 128
    window: int = 512
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The windows [samples][window] of token ids, and the files they are from (name -> sha256)."""

    windows: Sequence[Sequence[int]]
    files: Mapping[str, str]
    sampling: Sampling

    def some(self, count: int) -> Sequence[Sequence[int]]:
        """`count` windows, or all: of every file, and these lie one after another."""
        if count >= len(self.windows):
            return self.windows
        return [self.windows[number * len(self.windows) // count] for number in range(count)]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "files": dict(self.files),
            "samples": self.sampling.samples,
            "window": self.sampling.window,
            "seed": self.sampling.seed,
            "fingerprint": fingerprint(self.windows),
        }


class Reader:
    """Reads calibration files with one model's tokenizer and template."""

    def __init__(self, assets: TextAssets) -> None:
        self._tokenizer = Tokenizer(assets)
        self._chat = None if assets.template is None else Chat(self._tokenizer, assets)

    def read(self, paths: Sequence[Path], sampling: Sampling) -> Calibration:
        """The windows of the files, in equal shares.

        Raises `InvalidInputError` for a file that is too short for its share.
        """
        windows: list[list[int]] = []
        for index, path in enumerate(paths):
            start, stop = (sampling.samples * i // len(paths) for i in (index, index + 1))
            chance = np.random.default_rng([sampling.seed, index])
            windows += self._windows(path, stop - start, sampling.window, chance)
        files = {path.name: _sha256(path) for path in paths}
        return Calibration(windows=windows, files=files, sampling=sampling)

    def refuse(self, calibration: Calibration, held_out: Sequence[Path]) -> None:
        """Raises `InvalidInputError` where a text that will be measured was calibrated on."""
        known = fingerprint(calibration.windows)
        for path in held_out:
            pieces = self._pieces(path, sys.maxsize, np.random.default_rng(0))
            refuse_seen(path.name, shared(known, [token for ids in pieces for token in ids]))

    def _windows(
        self, path: Path, count: int, window: int, chance: np.random.Generator
    ) -> list[list[int]]:
        bos = self._tokenizer.with_bos([])
        step = window - len(bos)
        ids: list[int] = []
        for piece in self._pieces(path, PASSAGE * window, chance):
            ids += piece
            if len(ids) >= count * step:
                break
        if len(ids) < count * step:
            raise InvalidInputError(
                f"has {len(ids) // step} windows of {window} tokens; {count} are wanted of it",
                where=path,
                hint="more text, fewer --samples, or a smaller --window",
            )
        return [[*bos, *ids[i * step : (i + 1) * step]] for i in range(count)]

    def _pieces(self, path: Path, length: int, chance: np.random.Generator) -> Iterator[list[int]]:
        """The token ids of passages of about `length` characters or of conversations, shuffled."""
        if _chats(path):
            lines = read_lines(path)
            for index in chance.permutation(len(lines)):
                yield self._conversation(lines[index])
            return
        text = content_of(path)
        starts = range(0, len(text), length)
        for index in chance.permutation(len(starts)):
            passage = text[starts[index] : starts[index] + length]
            yield self._tokenizer.encode(passage, special=False)

    def _conversation(self, line: Line) -> list[int]:
        """Its token ids, without BOS."""
        messages = messages_of(line)
        if self._chat is None:
            text = "".join(f"{message['content']}\n\n" for message in messages)
            return self._tokenizer.encode(text, special=False)
        bos = self._tokenizer.with_bos([])
        return self._chat.render(messages, add_generation_prompt=False)[len(bos) :]


def refuse_seen(name: str, share: float) -> None:
    """Raises `InvalidInputError` where `share` of what was calibrated on stands in a text."""
    if share > TOLERATED:
        raise InvalidInputError(
            f"{share:.0%} of what the model was calibrated on stands in this text",
            where=name,
            hint="measure on a text that took no part, or calibrate on another",
        )


def _chats(path: Path) -> bool:
    return path.name.endswith(CONVERSATIONS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
