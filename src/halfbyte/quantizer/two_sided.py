"""Calibrated quantization for what the whole model predicts, by one walk through it and back.

For every weight both sides are gathered where the walk back passes (`gradients.py`): the second
moment of its inputs and that of the gradients at its outputs, each token counting as much as its
other side is large; so a token whose output nothing hangs on says little of the inputs. As soon as
a layer has been passed it is rounded (`yaqa.py`) and written to a folder (`stages.py`), the last
layer first; what takes tokens in comes last. After a kill the walk is taken again, and passes by
the finished layers.

A weight with more than `TALL` times as many outputs as inputs (gate and up, mostly) is rounded with
the second moment of its inputs alone: the other side would cost most of the time, and was measured
to bring nothing.

What it is not: it sees the states of the original, not those that what is quantized before gives
(`blockwise.py` does). Memory on the device: one layer, a few times the activations of a batch, and
both moments of the layer's weights. Beside it the states of all windows before every layer, and
their gradients, in main memory or on the disk.
Sources: Tseng et al. 2025, "Model-preserving adaptive rounding" (arXiv 2505.22988; the first step
of its power iteration); Kim et al. 2025, "GuidedQuant" (arXiv 2505.07004; tokens count by their
gradients).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.block import BORROWED, Block
from halfbyte.quantizer.calibrate import Calibration
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING, Ends
from halfbyte.quantizer.flow import IN_MEMORY, Flow
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.moment import SecondMoment, drawn_together
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.stages import Stages
from halfbyte.quantizer.tables import Tables, Wanted
from halfbyte.specs import Scheme

TALL = 2


class TwoSided:
    """One job: a source's tensors, stored in `schemes` by YAQA, into `stages`."""

    def __init__(
        self,
        source: Source,
        schemes: Mapping[str, Scheme],
        calibration: Calibration,
        stages: Stages,
        *,
        device: str = "cpu",
        in_memory: int = IN_MEMORY,
    ) -> None:
        self._source, self._stages, self._calibration = source, stages, calibration
        self._wanted = Wanted(source=source, schemes=schemes, method="yaqa")
        self._ops = ObservedOps(device)
        self._tables = Tables(self._wanted, self._ops)
        self._in_memory = in_memory

    def run(self, progress: Progress | None = None) -> None:
        """Makes every part that is not there yet. Raises as `Blockwise.run` does."""
        if all(map(self._stages.has, self._stages.names)):
            return
        visitor = _Visitor(self._source, self._wanted, self._stages, self._ops, progress)
        seed = self._calibration.sampling.seed
        Walk(self._source, self._ops, self._flow(), seed=seed).run(visitor)
        with torch.no_grad():
            self._outside(visitor.ends)
        if progress is not None:
            progress(self._source.spec.parameters, self._source.spec.parameters)

    def _outside(self, ends: Ends) -> None:
        """What lies before and after the layers."""
        given = {
            stage: {name: self._source.tensor(name) for name in self._stages.members(stage)}
            for stage in ("head", "embed")
            if not self._stages.has(stage)
        }
        if "head" in given:
            made = self._tables.exit(given["head"], lambda: damped(ends.final, DAMPING))
            self._stages.save("head", made)
        if "embed" in given:
            made = self._tables.entry(
                given["embed"], lambda: ends.hessian, lambda: self._flow().batches
            )
            self._stages.save("embed", made)

    def _flow(self) -> Flow:
        return Flow(
            self._source.spec,
            self._calibration.windows,
            self._stages.folder,
            in_memory=self._in_memory,
            every_layer=True,
        )


class _Sides:
    """Both second moments of one matrix."""

    def __init__(self, width: int, rows: int | None, device: str) -> None:
        self.inputs = SecondMoment(width, device)
        self.outputs = None if rows is None else SecondMoment(rows, device)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Inputs [R, K] and gradients at the outputs [R, N]."""
        self.inputs.add(x, gradient.square().sum(-1))
        if self.outputs is not None:
            self.outputs.add(gradient, x.square().sum(-1))


class _Visitor:
    """Gathers what the rounding of a layer needs, and rounds it when the walk leaves it."""

    def __init__(
        self,
        source: Source,
        wanted: Wanted,
        stages: Stages,
        ops: ObservedOps,
        progress: Progress | None,
    ) -> None:
        self.ends = Ends(source.spec, ops.device)
        self._source, self._wanted, self._stages = source, wanted, stages
        self._device, self._progress = ops.device, progress
        self._sides: dict[str, list[_Sides]] = {}  # of the layer that is passed, by experts
        self._done = 0

    def top(self, states: Tensor, probabilities: Tensor) -> None:
        self.ends.top(states, probabilities)

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        if self._stages.has(block.name):
            return
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            name = names[id(product.weight)]
            if not self._wanted.settled(name):
                sides = self._sides_of(name, product.weight.stored)
                sides[product.expert or 0].add(product.input, gradient)

    def left(self, block: Block) -> None:
        if not self._stages.has(block.name):
            self._stages.save(block.name, {name: self._made(block, name) for name in block.tensors})
        self._sides.clear()
        self._done += sum(q.stored.num_rows * q.stored.width for q in block.tensors.values())
        if self._progress is not None:
            self._progress(self._done, self._source.spec.parameters)

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        self.ends.entered(rows, gradient)

    def _sides_of(self, name: str, q: QTensor) -> list[_Sides]:
        if name not in self._sides:
            rows = q.shape[-2] if q.shape[-2] <= TALL * q.width else None
            count = q.shape[0] if len(q.shape) > 2 else 1
            self._sides[name] = [_Sides(q.width, rows, self._device) for _ in range(count)]
        return self._sides[name]

    def _made(self, block: Block, name: str) -> QTensor:
        """A tensor of a layer as it is stored."""
        if self._wanted.settled(name):
            return self._wanted.given(name, block.tensors[name].stored)
        sides = self._sides.pop(name)
        outputs = [side.outputs for side in sides if side.outputs is not None]
        return self._wanted.solved(
            name,
            block.dense[name],
            drawn_together([side.inputs for side in sides], BORROWED),
            drawn_together(outputs, BORROWED) if outputs else None,
        )
