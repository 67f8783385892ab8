"""The second moment of a stream of rows: what a calibrated method knows of a weight's inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

STRIPE = 256  # columns that are summed up whole; of more, what lies left of the diagonal is not


class SecondMoment:
    """The mean of x x^T [K, K] over rows x [K] that come in batches; f32, on their device.

    It is symmetric: half of it is summed up. What lies right of the diagonal is a square and twice
    the same of half the size, and large squares are what products are fast at.
    """

    def __init__(self, width: int, device: str) -> None:
        self._upper = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Rows [R, K]; with `weights` [R], not negative, the mean is of their products."""
        if weights is not None:
            x = x * weights.sqrt()[:, None]
        self._sum_up(x, 0, len(self._upper))
        self.rows += len(x)

    def _sum_up(self, x: Tensor, start: int, stop: int) -> None:
        """Adds the products of the columns from `start` to `stop` with each other."""
        if stop - start <= STRIPE:
            self._sum_block(x, slice(start, stop), slice(start, stop))
            return
        middle = start + (stop - start + STRIPE) // (2 * STRIPE) * STRIPE
        self._sum_block(x, slice(start, middle), slice(middle, stop))
        self._sum_up(x, start, middle)
        self._sum_up(x, middle, stop)

    def _sum_block(self, x: Tensor, rows: slice, columns: slice) -> None:
        self._upper[rows, columns].addmm_(x[:, rows].T, x[:, columns])

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
