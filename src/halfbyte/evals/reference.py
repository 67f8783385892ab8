"""What a reference model makes of texts, kept as its final hidden states.

The head is applied to a token's normed final state, so that the state in f32 gives the reference's
logits exactly, and takes little room: with a hidden width of 3840 and a vocabulary of 262,144 it is
15 KB a token instead of 1 MB. Many models are measured against one reference; it runs once, and
is out of memory while they run.

A file of states is known by what the states depend on: the reference's weights, the token ids of
the windows (so also text, tokenizer and protocol), and the program's version. Behind the states
stands their SHA-256; a file that does not agree with it is made anew.

What it is not: a file of log-probabilities in 16 bits, as llama-perplexity keeps, which puts a
floor under the divergence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte import __version__, env
from halfbyte.evals.reader import Reader
from halfbyte.evals.texts import Window
from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import ModelSpec

FOLDER = "states"
SLICE = 1 << 24  # weights of the head that are f32 at once
DIGEST = hashlib.sha256().digest_size

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Stored:
    """States [rows, hidden] that lie in a file. They are read, not mapped: pages of a map would be
    this process's memory for as long as there is enough."""

    path: Path
    shape: tuple[int, int]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Floats:
        hidden = self.shape[1]
        start, stop, _ = rows.indices(len(self))
        count, offset = (stop - start) * hidden, 4 * start * hidden
        found = np.fromfile(self.path, np.float32, count=count, offset=offset)
        return found.reshape(-1, hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a reference makes of the scored rows of one text: its final states [rows, hidden]."""

    spec: ModelSpec
    head: QTensor
    device: str
    states: Floats | Stored

    def logits(self, start: int, stop: int) -> Floats:
        """Logits [stop - start, V] of some rows; the head is decoded a slice at a time."""
        given = torch.from_numpy(self.states[start:stop]).to(self.device)
        logits = torch.cat([given @ part.T for part in self._slices()], dim=-1)
        softcap = self.spec.logit_softcap
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).cpu().numpy()

    def _slices(self) -> Iterator[torch.Tensor]:
        step = max(1, SLICE // self.spec.hidden)
        for start in range(0, self.spec.vocab, step):
            rows = self.head.rows(start, min(start + step, self.spec.vocab))
            yield decode(rows, device=self.device)


class Reference:
    """The model that others are held against.

    `ops` runs it where its states are not kept. `weights` is a hash of what it computes with;
    without one nothing is kept on disk.
    """

    def __init__(self, source: Source, ops: ReferenceOps, *, weights: str | None = None) -> None:
        self._source = source
        self._ops = ops
        self._weights = weights
        self._decoder: Decoder | None = None

    def read(
        self, texts: Sequence[Sequence[Window]], progress: Progress | None = None
    ) -> list[Baseline]:
        """What it makes of each text; the model is in memory only while states are made."""
        spec = self._source.spec
        head = self._source.tensor(spec.head_name)
        device = self._ops.device
        try:
            return [
                Baseline(
                    spec=spec,
                    head=head,
                    device=device,
                    states=kept(
                        text, spec.hidden, lambda some: self._run(some, progress), key=self._weights
                    ),
                )
                for text in texts
            ]
        finally:
            self._decoder = None

    def _run(self, windows: Sequence[Window], progress: Progress | None) -> Iterator[Floats]:
        if self._decoder is None:
            self._decoder = load(self._source, self._ops)
        longest = max(len(window.token_ids) for window in windows)
        reader = Reader(self._decoder, longest, "f32", states=True)
        for done, window in enumerate(windows, 1):
            yield from reader.rows(window)
            if progress is not None:
                progress(done, len(windows))


def kept(
    windows: Sequence[Window],
    hidden: int,
    run: Callable[[Sequence[Window]], Iterator[Floats]],
    *,
    key: str | None,
) -> Floats | Stored:
    """The states [rows, hidden] of the scored rows of `windows`, which `run` makes in pieces.

    With a `key`, which says all else that they depend on, they are on disk, and found there again.
    """
    shape = (sum(len(window.targets) for window in windows), hidden)
    if key is None:
        return np.concatenate([*run(windows)])
    path = _place(windows, key)
    if not _is_sound(path, size := 4 * prod(shape) + DIGEST):
        _write(path, run(windows), size=size)
    return Stored(path, shape)


def _place(windows: Sequence[Window], key: str) -> Path:
    found = hashlib.sha256(f"{__version__} {key}".encode())
    for window in windows:
        layout = [len(window.token_ids), window.first, *window.token_ids]
        found.update(np.array(layout, dtype=np.int64).tobytes())
    return env.cache_dir() / FOLDER / f"{found.hexdigest()[:32]}.f32"


def _write(path: Path, pieces: Iterator[Floats], *, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with atomic_file(path, size=size) as file:
        for piece in pieces:
            digest.update(piece.data)
            file.write(piece.data)
        file.write(digest.digest())


def _is_sound(path: Path, size: int) -> bool:
    """Whether the file is there, whole and unaltered."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return hashlib.sha256(data[:-DIGEST].data).digest() == data[-DIGEST:].tobytes()
