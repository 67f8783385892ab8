"""A recipe for a budget of bytes, from what every way to store every group costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.errors import DoesNotFitError
from halfbyte.formats.checkpoint import Source
from halfbyte.quantizer.allocate import Option, front, within
from halfbyte.quantizer.sensitivity import CANDIDATES, Shared, shared_of
from halfbyte.specs import Recipe


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


def allocated(
    source: Source, base: Recipe, costs: Mapping[tuple[str, str], float], budget: int
) -> Allocation:
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
