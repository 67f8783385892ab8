"""What of a model lies outside its layers, on its way to how it is stored.

The table that takes tokens in, the projection of the embeddings per layer, a head of its own, and
the vectors among them. A table of 8 bits is searched: its rounding is lost in that of the layers.
An embedding of fewer is solved for what the model's predictions hang on, which a walk through the
original and back tells (`gradients.py`), over some of the windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from halfbyte.kernels.reference.ops import Weight
from halfbyte.numerics.codec import convert, decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.ends import Ends
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import EMBED, HEAD, PROJECT
from halfbyte.quantizer.quantization import Quantization, stacked

FINE = frozenset({"q8_0"})
ROWS = 1 << 25  # weights of a table that are solved at once: 128 MiB in f32
WALKED = 4096  # tokens that walk through the original and back


class Tables:
    """The tables of a source."""

    def __init__(self, asked: Quantization, ops: ObservedOps) -> None:
        self._asked, self._ops = asked, ops

    def entry(self, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """What takes tokens in."""
        made = self._converted(tensors)
        if EMBED not in made:
            made[EMBED] = self._table(EMBED, tensors[EMBED], self._embedding_hessian())
        if PROJECT in tensors and PROJECT not in made:
            spec, table = self._asked.source.spec, Weight(made[EMBED])
            batches = self._asked.flow().batches
            states = (self._ops.embed(batch.rows, table, spec.embed_scale) for batch in batches)
            moment = SecondMoment.of(states, spec.hidden, self._ops.device)
            made[PROJECT] = self._table(PROJECT, tensors[PROJECT], moment.mean)
        return made

    def exit(
        self, tensors: Mapping[str, QTensor], hessian: Callable[[], Tensor]
    ) -> dict[str, QTensor]:
        """The final norm, and a head of its own; `hessian` gathers its inputs' [H, H]."""
        made = self._converted(tensors)
        if HEAD in tensors and HEAD not in made:
            made[HEAD] = self._table(HEAD, tensors[HEAD], hessian())
        return made

    def _embedding_hessian(self) -> Tensor:
        """What an error of the embedding costs [H, H]."""
        source, calibration = self._asked.source, self._asked.calibration
        ends = Ends(source.spec, self._ops.device)
        count = max(1, WALKED // max(map(len, calibration.windows)))
        flow = self._asked.flow(count, every_layer=True)
        Walk(source, self._ops, flow, seed=calibration.sampling.seed).run(ends)
        return ends.hessian

    def _converted(self, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """The tensors whose inputs say nothing of how to store them."""
        return {
            name: convert(q, self._asked.schemes[name], method="search")
            for name, q in tensors.items()
            if name not in (EMBED, PROJECT, HEAD)
            or self._asked.settled(name)
            or self._asked.schemes[name].name in FINE
        }

    def _table(self, name: str, q: QTensor, hessian: Tensor) -> QTensor:
        """A table of many rows, some of them at once."""
        step = max(1, ROWS // q.width)
        starts = range(0, q.num_rows, step)
        pieces = (q.rows(start, min(start + step, q.num_rows)) for start in starts)
        solved = [
            self._asked.solved(name, decode(piece, device=self._ops.device), hessian[None])
            for piece in pieces
        ]
        return stacked(solved, q.shape)
