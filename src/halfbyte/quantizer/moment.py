"""The second moment of a stream of rows: what a calibrated method knows of a weight's inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STRIPE = 512  # columns of which what lies left of the diagonal is not computed


class SecondMoment:
    """The mean of x x^T [K, K] over rows x [K] that come in batches; f32, on their device.

    It is symmetric: half of it is summed up, in stripes.
    """

    def __init__(self, width: int, device: str) -> None:
        self._upper = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Rows [R, K]; with `weights` [R], not negative, the mean is of their products."""
        if weights is not None:
            x = x * weights.sqrt()[:, None]
        for start in range(0, len(self._upper), STRIPE):
            columns = slice(start, start + STRIPE)
            self._upper[columns, start:].addmm_(x[:, columns].T, x[:, start:])
        self.rows += len(x)

    @property
    def total(self) -> Tensor:
        """The sum; it shares its memory with what is added to."""
        for start in range(0, len(self._upper), STRIPE):
            columns, right = slice(start, start + STRIPE), slice(start + STRIPE, None)
            self._upper[right, columns] = self._upper[columns, right].T
        return self._upper

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    @classmethod
    def of(cls, batches: Iterable[Tensor], width: int, device: str) -> SecondMoment:
        """The second moment of batches that come from anywhere."""
        moment = cls(width, device)
        for x in batches:
            moment.add(x.to(device))
        return moment


def drawn_together(moments: list[SecondMoment], borrowed: float) -> Tensor:
    """The means [E, K, K] of several, each with `borrowed` rows more of the mean of all.

    So one that saw few rows, or none, is much like the mean.
    """
    totals = torch.stack([moment.total for moment in moments])
    rows = torch.tensor([moment.rows for moment in moments], device=totals.device)
    mean = totals.sum(0) / rows.sum()
    return (totals + borrowed * mean) / (rows + borrowed)[:, None, None]
