"""A head that is not trained: it stays as it is stored, and is decoded as it is used.

A small one is kept in f32; a large one (a billion weights would be 4 GB) is decoded a slice of the
vocabulary at a time, forth and back.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor

KEPT = 1 << 25  # weights of a head that is kept in f32: 128 MiB
SLICE = 1 << 24


class StoredHead:
    """Logits of states, and what gradients at logits mean for states."""

    def __init__(self, stored: QTensor, device: str) -> None:
        self._stored, self.device = stored, device
        whole = stored.num_rows * stored.width <= KEPT
        self._kept = decode(stored, device=device) if whole else None

    def __len__(self) -> int:
        return self._stored.num_rows

    def product(self, states: Tensor) -> Tensor:
        """[R, V] of states [R, H]."""
        if self._kept is not None:
            return states @ self._kept.t()
        z = states.new_empty(len(states), len(self))
        for place, rows in self._slices():
            torch.mm(states, rows.t(), out=z[:, place])
        return z

    def back(self, at_logits: Tensor) -> Tensor:
        """The gradient [R, H] at states."""
        if self._kept is not None:
            return at_logits @ self._kept
        found = at_logits.new_zeros(len(at_logits), self._stored.width)
        for place, rows in self._slices():
            found.addmm_(at_logits[:, place], rows)
        return found

    def _slices(self) -> Iterator[tuple[slice, Tensor]]:
        step = max(1, SLICE // self._stored.width)
        for start in range(0, len(self), step):
            rows = self._stored.rows(start, min(start + step, len(self)))
            yield slice(start, start + rows.num_rows), decode(rows, device=self.device)
