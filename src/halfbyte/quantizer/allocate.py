"""Bits where they count: one scheme for every group of tensors, for a budget of bytes.

Every group has a few options, each with its exact bytes and what it costs; costs add up. The best
choice for every budget at once is a walk over the groups that keeps, of all partial choices, those
that no other beats in both bytes and cost (the multiple-choice knapsack by dominance). It is exact
up to `KEPT` of them; beyond, of those within a ten-thousandth of the bytes the best one stays.

What it is not: a judge of costs (`sensitivity.py` is), or of what a group is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

KEPT = 20_000


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a group of tensors."""

    scheme: str
    bytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Point:
    """A choice for all groups that nothing beats; `chosen[g]` indexes the options of group g."""

    bytes: int
    cost: float
    chosen: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """The partial choices after one more group: which of those before, and which option."""

    before: NDArray[np.int64]
    option: NDArray[np.int64]


def front(groups: Sequence[Sequence[Option]]) -> list[Point]:
    """All choices that nothing beats, by ascending bytes and descending cost."""
    sizes, costs = np.zeros(1, np.int64), np.zeros(1)
    layers: list[_Layer] = []
    for options in groups:
        before, option = np.divmod(np.arange(len(sizes) * len(options)), len(options))
        sizes = sizes[before] + np.array([o.bytes for o in options], np.int64)[option]
        costs = costs[before] + np.array([o.cost for o in options])[option]
        kept = _unbeaten(sizes, costs)
        sizes, costs = sizes[kept], costs[kept]
        layers.append(_Layer(before[kept], option[kept]))
    return [
        Point(int(size), float(cost), _chosen(layers, index))
        for index, (size, cost) in enumerate(zip(sizes, costs, strict=True))
    ]


def within(points: Sequence[Point], budget: int) -> Point | None:
    """The best choice of a front that fits; None where not even the smallest does."""
    fitting = [point for point in points if point.bytes <= budget]
    return fitting[-1] if fitting else None


def _unbeaten(sizes: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """The indices of what nothing beats, by ascending size."""
    order = np.lexsort((costs, sizes))
    lowest = np.minimum.accumulate(costs[order])
    better = np.concatenate([[True], costs[order][1:] < lowest[:-1]])
    kept = order[better]
    if len(kept) <= KEPT:
        return kept
    low, high = int(sizes[kept[0]]), int(sizes[kept[-1]])
    bucket = (sizes[kept] - low) * KEPT // (high - low + 1)
    last = np.concatenate([bucket[1:] != bucket[:-1], [True]])
    last[0] = True
    return kept[last]


def _chosen(layers: Sequence[_Layer], index: int) -> tuple[int, ...]:
    chosen: list[int] = []
    for layer in reversed(layers):
        chosen.append(int(layer.option[index]))
        index = int(layer.before[index])
    return tuple(reversed(chosen))
