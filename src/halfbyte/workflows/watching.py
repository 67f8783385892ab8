"""The memory that a stretch of work took, on the device that it was computed on."""

from __future__ import annotations

import torch

from halfbyte.planner.probe import forget_peak, peak_bytes, release, resident_bytes


class Watch:
    """The most memory that a stretch of this process took, above what it began with."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0
        self.peak = 0

    def begin(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            release()
            forget_peak()
            self._before = resident_bytes()

    def end(self) -> None:
        cuda = self._device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else peak_bytes()
        self.peak = max(0, peak - self._before)
