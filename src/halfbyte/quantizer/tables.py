"""What of a model lies outside its layers, on its way to how it is stored.

The table that takes tokens in, the projection of the embeddings per layer, a head of its own, and
the vectors among them. A table of 8 bits is searched: its rounding is lost in that of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.reference.ops import Weight
from halfbyte.numerics.codec import convert, decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.flow import Batch
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import EMBED, HEAD, PROJECT
from halfbyte.specs import Scheme, SolveMethod

PLAIN = frozenset({"f32", "f16", "bf16"})
FINE = frozenset({"q8_0"})
ROWS = 1 << 25  # weights of a table that are solved at once: 128 MiB in f32

Hessian = Callable[[], Tensor]
"""Gathers it [H, H]: a walk through the model that is only taken where it is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to become of a source's tensors: their schemes, and the method that rounds them."""

    source: Source
    schemes: Mapping[str, Scheme]
    method: SolveMethod

    def settled(self, name: str) -> bool:
        """Whether there is nothing to choose: it is on a grid already, or will be on none."""
        return not self.source.schemes[name].is_float or self.schemes[name].name in PLAIN

    def given(self, name: str, q: QTensor) -> QTensor:
        """A tensor as it will be stored where there is nothing to choose, else as it is."""
        return convert(q, self.schemes[name]) if self.settled(name) else q

    def solved(
        self, name: str, weight: Tensor, hessians: Tensor, outputs: Tensor | None = None
    ) -> QTensor:
        """A weight [N, K] with hessians [1, K, K], or a stack [E, N, K] with [E, K, K]; `outputs`
        [1 or E, N, N] where the method looks at both sides."""
        matrices = weight if weight.ndim > 2 else weight[None]
        solved = [
            solve(
                name,
                matrix,
                hessians[index],
                self.schemes[name],
                self.method,
                outputs=None if outputs is None else outputs[index],
            )
            for index, matrix in enumerate(matrices)
        ]
        return stacked(solved, tuple(weight.shape))


class Tables:
    """The tables of a source."""

    def __init__(self, wanted: Wanted, ops: ObservedOps) -> None:
        self._wanted, self._ops = wanted, ops

    def entry(
        self,
        tensors: Mapping[str, QTensor],
        hessian: Hessian,
        batches: Callable[[], Iterable[Batch]],
    ) -> dict[str, QTensor]:
        """What takes tokens in; `batches` are those it takes in."""
        made = self._converted(tensors)
        if EMBED not in made:
            made[EMBED] = self._table(EMBED, tensors[EMBED], hessian())
        if PROJECT in tensors and PROJECT not in made:
            source, table = self._wanted.source, Weight(made[EMBED])
            scale = source.spec.embed_scale
            states = (self._ops.embed(batch.rows, table, scale) for batch in batches())
            moment = SecondMoment.of(states, source.spec.hidden, self._ops.device)
            made[PROJECT] = self._table(PROJECT, tensors[PROJECT], moment.mean)
        return made

    def exit(self, tensors: Mapping[str, QTensor], hessian: Hessian) -> dict[str, QTensor]:
        """The final norm, and a head of its own."""
        made = self._converted(tensors)
        if HEAD in tensors and HEAD not in made:
            made[HEAD] = self._table(HEAD, tensors[HEAD], hessian())
        return made

    def _converted(self, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """The tensors whose inputs say nothing of how to store them."""
        return {
            name: convert(q, self._wanted.schemes[name], method="search")
            for name, q in tensors.items()
            if name not in (EMBED, PROJECT, HEAD)
            or self._wanted.settled(name)
            or self._wanted.schemes[name].name in FINE
        }

    def _table(self, name: str, q: QTensor, hessian: Tensor) -> QTensor:
        """A table of many rows, some of them at once."""
        step = max(1, ROWS // q.width)
        starts = range(0, q.num_rows, step)
        pieces = (q.rows(start, min(start + step, q.num_rows)) for start in starts)
        solved = [
            self._wanted.solved(name, decode(piece, device=self._ops.device), hessian[None])
            for piece in pieces
        ]
        return stacked(solved, q.shape)


def stacked(parts: Sequence[QTensor], shape: tuple[int, ...]) -> QTensor:
    """Stored rows on top of each other, as one tensor of this shape."""
    if len(parts) == 1:
        return QTensor(parts[0].scheme, shape, parts[0].data)
    return QTensor(parts[0].scheme, shape, np.concatenate([part.data for part in parts]))
