"""Calibrated quantization for what the whole model predicts, by one walk through it and back.

For every weight both sides are gathered (`sides.py`) where the walk back passes (`gradients.py`).
As soon as a layer has been passed it is rounded (`yaqa.py`) and written to a folder (`stages.py`),
the last layer first. After a kill the walk is taken again, and passes by the finished layers.

What takes tokens in is made before (`tables.py`), and the walk is through a model that has it: all
layers are rounded for the states that it gives.

A weight with more than `TALL` times as many outputs as inputs (gate and up, mostly) is rounded with
the second moment of its inputs alone: the other side would cost most of the time, and was measured
to bring nothing.

What it is not: a layer does not see the states that the quantized layers before it give
(`blockwise.py` does that). Memory on the device: one layer, a few times the activations of a batch,
and both moments of the layer's weights. Beside it the states of all windows before every layer, and
their gradients, in main memory or on the disk.
Sources: Tseng et al. 2025, "Model-preserving adaptive rounding" (arXiv 2505.22988); Kim et al.
2025, "GuidedQuant" (arXiv 2505.07004; tokens count by their gradients).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from halfbyte.formats.checkpoint import Replaced
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.block import Block
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.sides import BothSides
from halfbyte.quantizer.tables import Tables

TALL = 2


class TwoSided:
    """One job: what is asked is made by YAQA."""

    def __init__(self, asked: Quantization) -> None:
        self._asked = asked
        self._ops = ObservedOps(asked.device)
        self._tables = Tables(asked, self._ops)

    def run(self, progress: Progress | None = None) -> None:
        """Makes every part that is not there yet. Raises as `Blockwise.run` does."""
        asked, stages = self._asked, self._asked.stages
        with torch.no_grad():
            self._make("embed", self._tables.entry)
        entry = dict(stages.load("embed"))
        visitor = _Visitor(asked, self._ops, progress, done=entry)
        flow = asked.flow(every_layer=True)
        seed = asked.calibration.sampling.seed
        Walk(Replaced(asked.source, entry), self._ops, flow, seed=seed).run(visitor)
        with torch.no_grad():
            self._make("head", lambda given: self._tables.exit(given, lambda: visitor.head_hessian))
        if progress is not None:
            progress(asked.source.spec.parameters, asked.source.spec.parameters)

    def _make(
        self, stage: str, make: Callable[[Mapping[str, QTensor]], Mapping[str, QTensor]]
    ) -> None:
        """A part outside the layers, if it is not there yet."""
        stages = self._asked.stages
        if not stages.has(stage):
            given = {name: self._asked.source.tensor(name) for name in stages.members(stage)}
            stages.save(stage, make(given))


class _Visitor:
    """Gathers what the rounding of a layer needs, and rounds it when the walk leaves it.

    `done` are the tensors that were made before."""

    def __init__(
        self,
        asked: Quantization,
        ops: ObservedOps,
        progress: Progress | None,
        *,
        done: Mapping[str, QTensor],
    ) -> None:
        self._asked, self._progress = asked, progress
        self._final = SecondMoment(asked.source.spec.hidden, ops.device)
        self._sides = BothSides(ops.device)  # of the layer that is passed
        self._done = 0
        self._count(done.values())

    @property
    def head_hessian(self) -> Tensor:
        return damped(self._final.mean, DAMPING)

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        self._final.add(states)

    def behind(self, block: Block, gradient: Tensor) -> None:
        pass

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        if self._asked.stages.has(block.name):
            return
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            name = names[id(product.weight)]
            if not self._asked.settled(name):
                q = product.weight.stored
                outputs = q.shape[-2] <= TALL * q.width
                self._sides.add(name, product, gradient, outputs=outputs)

    def left(self, block: Block) -> None:
        stages = self._asked.stages
        if not stages.has(block.name):
            stages.save(block.name, {name: self._made(block, name) for name in block.tensors})
        self._count(weight.stored for weight in block.tensors.values())

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        pass

    def _count(self, made: Iterable[QTensor]) -> None:
        self._done += sum(q.num_rows * q.width for q in made)
        if self._progress is not None:
            self._progress(self._done, self._asked.source.spec.parameters)

    def _made(self, block: Block, name: str) -> QTensor:
        """A tensor of a layer as it is stored."""
        if self._asked.settled(name):
            return self._asked.given(name, block.tensors[name].stored)
        inputs, outputs = self._sides.taken(name)
        return self._asked.solved(name, block.dense[name], inputs, outputs)
