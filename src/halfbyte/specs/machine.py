"""What a machine is, as values: its device for the model, and what that can do.

Who asks the hardware is `planner/probe.py`; a card from a table is the same kind of value, so a
plan for a machine that is not here is made by the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One device that a model runs on.

    `memory_bytes` is all it has, `used_bytes` what other processes hold of it now. `bandwidth` is
    what it reads per second, in bytes; `measured` tells a figure of this machine from a listed one.
    `host` is what a card is in: its processors and memory take the layers that a card does not.
    """

    name: str
    kind: DeviceKind
    memory_bytes: int
    used_bytes: int = 0
    bandwidth: float | None = None
    measured: bool = False
    processors: int = 1
    host: Machine | None = None

    @property
    def free_bytes(self) -> int:
        return max(0, self.memory_bytes - self.used_bytes)
