"""What came of a task, item by item, and two models side by side on the same items.

A score hides damage: items that a quantized model gets wrong and others that it happens to get
right cancel in it. Flips are counted both ways, and McNemar's exact test says how likely so uneven
a count is by chance. Source: "Accuracy is not all you need" (arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import fmean


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One item: whether it is `right`, what was answered, and further numbers by name.

    `token_ids` are those of the answer, where it was generated.
    """

    right: bool
    answer: str
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Items that changed sides, out of all: `to_wrong` from right to wrong, `to_right` back.

    `rate` is both over the items, `changed_answers` the fraction answered otherwise, right or
    wrong. `p_value`: of a split at least so uneven, if both ways were equally likely.
    """

    rate: float
    to_wrong: int
    to_right: int
    changed_answers: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """A task's `score`, the fraction of right items, and the means of its further numbers.

    The last three are None without a reference.
    """

    name: str
    kind: str
    items: int
    score: float
    numbers: Mapping[str, float]
    reference_score: float | None = None
    reference_numbers: Mapping[str, float] | None = None
    flips: Flips | None = None


def summarize(
    name: str, kind: str, ours: Sequence[Outcome], theirs: Sequence[Outcome] | None = None
) -> TaskResult:
    """The outcomes of a model, and of its reference on the same items, as numbers."""
    return TaskResult(
        name=name,
        kind=kind,
        items=len(ours),
        score=_score(ours),
        numbers=_means(ours),
        reference_score=None if theirs is None else _score(theirs),
        reference_numbers=None if theirs is None else _means(theirs),
        flips=None if theirs is None else flips(ours, theirs),
    )


def flips(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> Flips:
    """How the outcomes of the same items differ."""
    pairs = [*zip(ours, theirs, strict=True)]
    to_wrong = sum(their.right and not our.right for our, their in pairs)
    to_right = sum(our.right and not their.right for our, their in pairs)
    return Flips(
        rate=(to_wrong + to_right) / len(pairs),
        to_wrong=to_wrong,
        to_right=to_right,
        changed_answers=fmean(our.answer != their.answer for our, their in pairs),
        p_value=mcnemar(to_wrong, to_right),
    )


def mcnemar(one: int, other: int) -> float:
    """The two-sided exact p-value of a split of `one + other` discordant pairs."""
    total, fewer = one + other, min(one, other)
    tail = sum(comb(total, k) for k in range(fewer + 1)) / 2**total
    return min(1.0, 2 * tail)


def _score(outcomes: Sequence[Outcome]) -> float:
    return fmean(outcome.right for outcome in outcomes)


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean of each number over the items that have it."""
    names = dict.fromkeys(name for outcome in outcomes for name in outcome.numbers)
    return {name: fmean(o.numbers[name] for o in outcomes if name in o.numbers) for name in names}
