"""Choosing the scale of a block of weights on an integer grid.

A block stores integers q in [low, high] and one scale d, and means d * q. Everything here works on
the scale *as it will be stored* (`storable` rounds a wish to it) before it is judged, so what is
minimised is the error that ships. Vectorised over blocks: x is f32 [blocks, weights per block],
scales are [blocks, 1]. Candidates stay within a level of the plain rule: farther off, a scale can
win on a few weights and clip the largest, which costs more in a model than it shows in the sum.

What it is not: it looks at one block alone; it knows nothing of correlations between weights (GPTQ
does). Price: a search takes about nine times as long as rounding to nearest.
Idea: the scale searches of ggml's quantizers; the rounding of every candidate first is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

# Where to look, in levels, around the two rules "the extremum becomes `low`" and "... `high`".
FINE = tuple(0.9 * step / 5 for step in range(-5, 6))
COARSE = (FINE[0], FINE[-1])
# How much of each end of the weights a grid with a zero point spans; all of it is the plain rule.
ENDS = (1.0, 1.06, 0.93, 0.86)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scales:
    """How groups of weights are stored, but for their integers: a weight is step * integer.

    `step`, `low` and `high` (the ends of the integers) are f32 [rows, groups], exactly as stored.
    `unit` [rows, groups] is what the step is a whole multiple of, where the scheme has that.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    unit: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Scales:
        """The same of every field."""
        unit = None if self.unit is None else change(self.unit)
        return Scales(
            step=change(self.step), low=change(self.low), high=change(self.high), unit=unit
        )


def joined(parts: Sequence[Scales]) -> Scales:
    """Scales one after the other."""
    units = [part.unit for part in parts if part.unit is not None]
    return Scales(
        step=torch.cat([part.step for part in parts]),
        low=torch.cat([part.low for part in parts]),
        high=torch.cat([part.high for part in parts]),
        unit=torch.cat(units) if units else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The integers [low, high] that a block can store; -low >= high."""

    low: int
    high: int

    @property
    def sides(self) -> tuple[int, ...]:
        """The ends that differ by more than the sign of the scale."""
        return (self.low,) if self.low == -self.high else (self.low, self.high)

    def scales(self, step: Tensor, unit: Tensor | None = None) -> Scales:
        """Scales of which every group has these ends."""
        low, high = (torch.full_like(step, end) for end in (self.low, self.high))
        return Scales(step=step, low=low, high=high, unit=unit)


def signed_extremum(x: Tensor) -> Tensor:
    """The weight of largest magnitude of each block, with its sign; the first of equals. [n, 1]"""
    high, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    extremum = torch.where(high > -low, high, low)
    tied = (high == -low).flatten().nonzero().flatten()
    if tied.numel():
        blocks = x[tied]
        extremum[tied] = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    return extremum


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that is not a number, so that an empty block gives zeros."""
    return torch.nan_to_num(scale.reciprocal(), nan=0.0, posinf=0.0, neginf=0.0)


def nearest(x: Tensor, scale: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """The integers of the grid nearest to x / scale, as f32 [n, block]."""
    return torch.mul(x, inverse(scale), out=out).round_().clamp_(grid.low, grid.high)


def nearest_on(x: Tensor, scales: Scales, out: Tensor | None = None) -> Tensor:
    """The integers nearest to x [n, width] for the scales of its groups, f32 [n, width]."""
    groups = (scales.step.shape[1], -1)
    result = torch.empty_like(x) if out is None else out
    each = result.unflatten(1, groups)
    torch.mul(x.unflatten(1, groups), inverse(scales.step)[..., None], out=each).round_()
    # Not clamp, which takes five times as long to broadcast its bounds.
    torch.maximum(each, scales.low[..., None], out=each)
    torch.minimum(each, scales.high[..., None], out=each)
    return result


def meant(integers: Tensor, scales: Scales) -> Tensor:
    """The weights [n, width] that integers [n, width] stand for."""
    return integers.unflatten(1, (scales.step.shape[1], -1)).mul(scales.step[..., None]).flatten(1)


def around(
    x: Tensor, grid: Grid, storable: Callable[[Tensor], Tensor], offsets: Sequence[float] = FINE
) -> Iterator[Scales]:
    """Scales that put the extremum at `low`, and then near either end."""
    extremum = signed_extremum(x)
    yield grid.scales(storable(extremum / grid.low))
    for side, offset in product(grid.sides, offsets):
        yield grid.scales(storable(extremum / (side + offset)))


def spans(
    x: Tensor, levels: int, storable: Callable[[Tensor], Tensor], ends: Sequence[float] = ENDS
) -> Iterator[Scales]:
    """Scales with a zero point: `levels` integers over parts of both ends of x, and 0."""
    low = x.amin(dim=1, keepdim=True).clamp_(max=0)
    high = x.amax(dim=1, keepdim=True).clamp_(min=0)
    for below, above in product(ends, ends):
        bottom = low * below
        step = storable((high * above - bottom) / (levels - 1))
        zero = (-bottom * inverse(step)).round_().clamp_(0, levels - 1)
        yield Scales(step=step, low=-zero, high=levels - 1 - zero)


def search(
    x: Tensor,
    candidates: Iterable[Scales],
    storable: Callable[[Tensor], Tensor],
    weights: Tensor | None = None,
) -> Scales:
    """The scales of least squared error, weighted by `weights` [n, block] if given.

    Starts from the first candidate and changes only for the better, so no block gets worse by it;
    at last to the steps that suit the integers best.
    """
    judge = _Judge(x=x, weights=weights, scratch=torch.empty_like(x))
    best, least = judge.best_of(candidates)
    refitted = replace(best, step=storable(judge.refit(best)))
    return judge.better(refitted, best, least)[0]


def glance(x: Tensor, candidates: Iterable[Scales]) -> Scales:
    """The best of few candidates: a search in a fraction of the time."""
    return _Judge(x=x, weights=None, scratch=torch.empty_like(x)).best_of(candidates)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """What scales cost on these blocks. `scratch` is one buffer of x's size for every trial."""

    x: Tensor
    weights: Tensor | None
    scratch: Tensor

    def error(self, scales: Scales) -> Tensor:
        """sum(w (x - d q)^2) [n, 1] with the nearest integers q."""
        integers = nearest_on(self.x, scales, out=self.scratch)
        squares = torch.addcmul(self.x, integers, scales.step, value=-1, out=self.scratch).square_()
        return self._weighted(squares).sum(dim=1, keepdim=True)

    def best_of(self, candidates: Iterable[Scales]) -> tuple[Scales, Tensor]:
        """The best, and its error [n, 1]."""
        best, *others = candidates
        least = self.error(best)
        for candidate in others:
            best, least = self.better(candidate, best, least)
        return best, least

    def better(self, candidate: Scales, best: Scales, least: Tensor) -> tuple[Scales, Tensor]:
        error = self.error(candidate)
        wins = error < least  # never where the candidate overflowed: its error is not a number
        chosen = Scales(
            step=torch.where(wins, candidate.step, best.step),
            low=torch.where(wins, candidate.low, best.low),
            high=torch.where(wins, candidate.high, best.high),
        )
        return chosen, torch.where(wins, error, least)

    def refit(self, scales: Scales) -> Tensor:
        """The best steps for the integers that `scales` give: sum(w x q) / sum(w q q)."""
        integers = nearest_on(self.x, scales, out=self.scratch)
        products = self._weighted(integers * self.x).sum(dim=1, keepdim=True)
        squares = self._weighted(integers.square_()).sum(dim=1, keepdim=True)
        return products * inverse(squares)

    def _weighted(self, terms: Tensor) -> Tensor:
        return terms if self.weights is None else terms.mul_(self.weights)
