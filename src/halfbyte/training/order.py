"""In what order samples are learned from: a function of the seed and the step, nothing to keep.

Every epoch is a permutation of its own, and a batch is the next piece of it; one that reaches
beyond the end of an epoch takes the beginning of the next. So a run that is resumed at a step sees
what the run that was never stopped saw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """Of `count` samples, `batch` at a time."""

    count: int
    batch: int
    seed: int = 0

    def of(self, step: int) -> list[int]:
        """The samples of a step, from 0 on."""
        found: list[int] = []
        place = step * self.batch
        while len(found) < self.batch:
            epoch, start = divmod(place, self.count)
            piece = self._epoch(epoch)[start : start + self.batch - len(found)]
            found += piece
            place += len(piece)
        return found

    def _epoch(self, epoch: int) -> list[int]:
        return np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
