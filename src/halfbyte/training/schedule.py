"""How fast it is learned at each step: a linear warm-up, then a cosine down to a share of the peak.

Source of the cosine: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), without restarts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`rate` is the peak, reached after `warmup` of `steps`; the last step has `final` of it."""

    steps: int
    rate: float
    warmup: int = 0
    final: float = 0.05

    def at(self, step: int) -> float:
        """The rate of a step, from 0 on."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        part = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        return self.rate * (self.final + (1 - self.final) * (1 + cos(pi * min(1.0, part))) / 2)
