"""One calibrated quantization: what becomes of a source's tensors, by what windows, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.numerics.codec import convert
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.calibrate import Calibration
from halfbyte.quantizer.flow import IN_MEMORY, Flow
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.stages import Stages
from halfbyte.specs import Scheme, SolveMethod

PLAIN = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The tensors of `source`, stored in `schemes` by a method, part by part, in `stages`.

    `in_memory`: bytes of the windows' states; more of them go to the disk.
    """

    source: Source
    schemes: Mapping[str, Scheme]
    method: SolveMethod
    calibration: Calibration
    stages: Stages
    device: str = "cpu"
    in_memory: int = IN_MEMORY

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

    def flow(self, count: int | None = None, *, every_layer: bool = False) -> Flow:
        """All windows, or `count` of them; before the first layer."""
        calibration = self.calibration
        return Flow(
            self.source.spec,
            calibration.windows if count is None else calibration.some(count),
            self.stages.folder,
            in_memory=self.in_memory,
            every_layer=every_layer,
        )


def stacked(parts: Sequence[QTensor], shape: tuple[int, ...]) -> QTensor:
    """Stored rows on top of each other, as one tensor of this shape."""
    if len(parts) == 1:
        return QTensor(parts[0].scheme, shape, parts[0].data)
    return QTensor(parts[0].scheme, shape, np.concatenate([part.data for part in parts]))
