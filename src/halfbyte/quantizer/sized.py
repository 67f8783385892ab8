"""A recipe for a budget of bytes, from what every way to store every group costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import DoesNotFitError
from halfbyte.formats.checkpoint import Source
from halfbyte.quantizer.allocate import Option, front, within
from halfbyte.quantizer.sensitivity import CANDIDATES, Costs, Shared, shared_of
from halfbyte.specs import Recipe

SHOWN = 16  # points of a front that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What was chosen for a group of tensors."""

    group: Shared
    option: Option

    def rules(self) -> list[tuple[str, str]]:
        """The rules of a recipe that store the group so."""
        return [(n, s.name) for n, s in self.group.schemes_for(self.option.scheme).items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The best recipe within a budget, and beside it what other budgets would bring.

    `bytes` are those of all tensors, exactly; `cost` is the predicted divergence in nats per token.
    `front` holds (bytes, cost) of every choice that nothing beats, ascending in bytes.
    """

    recipe: Recipe
    bytes: int
    cost: float
    parts: Sequence[Part]
    front: Sequence[tuple[int, float]]

    def facts(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "bytes": self.bytes,
            "predicted_kl": self.cost,
            "schemes": {part.group.name: part.option.scheme for part in self.parts},
            "front": [{"bytes": size, "predicted_kl": cost} for size, cost in self._shown()],
        }

    def _shown(self) -> Sequence[tuple[int, float]]:
        """The front, thinned to what a table can show; the ends are among it."""
        step = max(1, (len(self.front) - 1) / (SHOWN - 1))
        return [self.front[round(i * step)] for i in range(min(SHOWN, len(self.front)))]


def allocated(source: Source, base: Recipe, costs: Costs, budget: int) -> Allocation:
    """The allocation of `budget` bytes; `base` says how to store what there is no choice for.

    Raises `DoesNotFitError` where the smallest choice is larger.
    """
    groups = shared_of(source)
    options = [
        [Option(wish, group.bytes(wish), costs[group.name, wish]) for wish in CANDIDATES]
        for group in groups
    ]
    fixed = _bytes_beside(groups, source, base)
    points = front(options)
    point = within(points, budget - fixed)
    if point is None:
        raise DoesNotFitError(
            f"{budget} bytes are too few; the smallest choice takes {fixed + points[0].bytes}",
            where="--size",
        )
    parts = [
        Part(group=group, option=of[index])
        for group, of, index in zip(groups, options, point.chosen, strict=True)
    ]
    rules = [rule for part in parts for rule in part.rules()]
    return Allocation(
        recipe=Recipe(name=base.name, rules=(*rules, *base.rules)),
        bytes=fixed + point.bytes,
        cost=point.cost,
        parts=parts,
        front=[(fixed + other.bytes, other.cost) for other in points],
    )


def _bytes_beside(groups: Sequence[Shared], source: Source, base: Recipe) -> int:
    """Of the tensors for which there is no choice."""
    chosen = {name for group in groups for name in group.shapes}
    return sum(
        base.scheme_for(tensor.name, tensor.shape).bytes(tensor.shape)
        for tensor in source.spec.tensors()
        if tensor.name not in chosen
    )
