"""What a target makes of passages: its final states, and the keys and values a drafter reads.

The reference op set runs the target as it is stored (its four-bit weights decoded, activations in
f32), once; what came of it lies in a file, f16 states and bf16 keys and values, row by row. Of this
the page cache keeps in memory what fits. A killed run goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.formats.atomic import require_space, write_errors, write_file
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.decoder import Decoder
from halfbyte.specs import ModelSpec
from halfbyte.training.passages import Passage

AT_ONCE = 4096  # tokens in a forward of the target
DATA, DONE = "seen.bin", "seen.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """A row of the file: a token's state, then its keys and values in each layer of `reads`."""

    hidden: int
    reads: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]  # (key/value heads, head dim) of each

    @classmethod
    def of(cls, target: ModelSpec, reads: Sequence[int]) -> RowLayout:
        distinct = sorted(set(reads))
        layers = [target.layers[index].attention for index in distinct]
        return cls(
            hidden=target.hidden,
            reads=tuple(distinct),
            shapes=tuple((layer.kv_heads, layer.head_dim) for layer in layers),
        )

    @property
    def numbers(self) -> int:
        """Of two bytes each."""
        return self.hidden + sum(2 * prod(shape) for shape in self.shapes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a target made of one passage, in f32: states [T, H]; by layer keys, values [T, G, D]."""

    states: Tensor
    kept: dict[int, tuple[Tensor, Tensor]]


class Seen:
    """The rows of some passages, in a file of `folder`; complete once `make` has run."""

    def __init__(self, layout: RowLayout, passages: Sequence[Passage], folder: Path) -> None:
        self._layout = layout
        self._folder = folder
        self._starts = np.cumsum([0, *(len(passage.ids) for passage in passages)]).tolist()
        self._passages = passages

    @property
    def bytes(self) -> int:
        return 2 * self._layout.numbers * self._starts[-1]

    def make(self, target: Decoder, progress: Progress | None = None) -> None:
        """Runs the target over what it has not seen yet.

        Raises `DoesNotFitError` where the disk has no room, `IntegrityError` where the target's
        numbers are none.
        """
        done = self._done()
        if done == len(self._passages):
            return
        with write_errors(self._folder):
            require_space(self._folder, self.bytes - 2 * self._layout.numbers * self._starts[done])
            with (self._folder / DATA).open("ab") as file:
                file.truncate(self.bytes)
        rows = self._rows("r+")
        while done < len(self._passages):
            last = self._few(done)
            rows[self._starts[done] : self._starts[last]] = self._made(target, done, last)
            rows.flush()
            done = last
            self._mark(done)
            if progress is not None:
                progress(self._starts[done], self._starts[-1])

    def window(self, index: int) -> Window:
        """What the target made of a passage."""
        start, stop = self._starts[index : index + 2]
        rows = torch.from_numpy(np.array(self._rows("r")[start:stop]))
        layout = self._layout
        sizes = [layout.hidden, *(prod(shape) for shape in layout.shapes for _ in range(2))]
        states, *parts = rows.split(sizes, dim=-1)
        kept = [
            part.contiguous().view(torch.bfloat16).float().unflatten(-1, shape)
            for part, shape in zip(
                parts, (shape for shape in layout.shapes for _ in range(2)), strict=True
            )
        ]
        return Window(
            states=states.contiguous().view(torch.float16).float(),
            kept=dict(zip(layout.reads, zip(kept[::2], kept[1::2], strict=True), strict=True)),
        )

    def _rows(self, mode: Literal["r", "r+"]) -> np.memmap[Any, Any]:
        shape = (self._starts[-1], self._layout.numbers)
        return np.memmap(self._folder / DATA, dtype=np.int16, mode=mode, shape=shape)

    def _few(self, first: int) -> int:
        """Where the passages end that are run together from `first` on."""
        last, limit = first + 1, self._starts[first] + AT_ONCE
        while last < len(self._passages) and self._starts[last + 1] <= limit:
            last += 1
        return last

    def _made(self, target: Decoder, first: int, last: int) -> np.ndarray:
        some = self._passages[first:last]
        spans = [Span(start=0, count=len(it.ids), pages=(), ring=0) for it in some]
        rows = Rows(token_ids=[token for it in some for token in it.ids], spans=spans)
        keys = scratch_caches(target.spec)
        with torch.no_grad():
            states = target.states(rows, keys)
        if not bool(states.isfinite().all()) or float(states.abs().max()) > 65504:
            raise IntegrityError("the target's states are no numbers, or beyond f16")
        parts = [states.to(torch.float16).view(torch.int16)]
        for index in self._layout.reads:
            for part in zip(
                *(keys[index].read(span, 0, span.count) for span in spans), strict=True
            ):
                parts.append(torch.cat(part).flatten(1).to(torch.bfloat16).view(torch.int16))
        return torch.cat([part.cpu() for part in parts], dim=-1).numpy()

    def _done(self) -> int:
        place = self._folder / DONE
        return int(json.loads(place.read_text())["passages"]) if place.exists() else 0

    def _mark(self, done: int) -> None:
        text = json.dumps({"passages": done}).encode()
        write_file(self._folder / DONE, text)


def scratch_caches(spec: ModelSpec) -> list[ScratchKV]:
    """A cache for every layer; those that read another's have that one."""
    found: list[ScratchKV] = []
    for layer in spec.layers:
        found.append(ScratchKV() if layer.kv_source is None else found[layer.kv_source])
    return found
