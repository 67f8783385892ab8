"""The device behind the Triton op set: its memory, and what it can do.

A CUDA device runs compiled kernels; the CPU stands for Triton's interpreter, which is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.triton import packing
from halfbyte.kernels.triton.layout import layout_of, packed_bytes
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import Scheme

BANDWIDTH_BYTES = 1 << 28
ROUNDS = 5


class Device:
    """One CUDA device, or the CPU for the interpreter. Raises `UnsupportedError`."""

    def __init__(self, name: str = "cuda") -> None:
        self.name = name
        self.interpreted = name == "cpu"
        if self.interpreted != interpreting():
            raise UnsupportedError(
                "Triton's kernels run on a CPU in its interpreter only, and the interpreter only "
                "on a CPU",
                hint="set TRITON_INTERPRET=1 for the interpreter, or unset it for a GPU",
            )
        self._room: Tensor | None = None
        self._used = 0

    @property
    def capability(self) -> tuple[int, int] | None:
        """The card's compute capability; None for the interpreter."""
        return None if self.interpreted else torch.cuda.get_device_capability(self.name)

    def current(self) -> AbstractContextManager[object]:
        """Within it, launches of this thread go to this device."""
        return nullcontext() if self.interpreted else torch.cuda.device(self.name)

    def operand(self, kind: str) -> str:
        """How the kernels hold operands (`numbers`)."""
        return "bf16-f32" if kind == "bf16" and self.interpreted else kind

    def reserve(self, size: int) -> None:
        """Takes memory for what is packed next."""
        self._room, self._used = torch.empty(size, dtype=torch.uint8, device=self.name), 0

    def zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.uint8, device=self.name)

    def pack(self, q: QTensor) -> Tensor:
        room = self._take(packed_bytes(q.scheme, q.shape))
        if len(q.shape) == 1:
            numbers = torch.from_numpy(q.data.reshape(-1).view(np.float32).copy())
            vector = room.view(torch.float32)[: len(numbers)]
            vector.copy_(numbers)
            return vector
        packing.pack(q, layout_of(q.scheme, q.shape), room)
        return room

    def unpack(self, data: Tensor, scheme: Scheme, shape: Sequence[int]) -> QTensor:
        if len(shape) == 1:
            return QTensor(scheme, tuple(shape), data.cpu().numpy().view(np.uint8)[None])
        return packing.unpack(layout_of(scheme, shape), data, tuple(shape))

    def is_finite(self, data: Tensor, scheme: Scheme, shape: Sequence[int]) -> bool:
        """Whether the numbers and scales of a packed matrix are finite."""
        planes = packing.views(layout_of(scheme, shape), data).values()
        return all(bool(it.isfinite().all()) for it in planes if it.is_floating_point())

    def read_bandwidth(self) -> float | None:
        """Bytes per second that a copy reads and writes; None in the interpreter."""
        if self.interpreted:
            return None
        source = torch.zeros(BANDWIDTH_BYTES, dtype=torch.uint8, device=self.name)
        target = torch.empty_like(source)
        best = float("inf")
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        return 2 * BANDWIDTH_BYTES / best

    def _take(self, size: int) -> Tensor:
        """Memory of the reserved piece while it lasts, else of its own."""
        if self._room is None or self._used + size > len(self._room):
            return torch.empty(size, dtype=torch.uint8, device=self.name)
        self._used += size
        return self._room[self._used - size : self._used]


def interpreting() -> bool:
    """Whether Triton was told to interpret (when it was imported)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)
