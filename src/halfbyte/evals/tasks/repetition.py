"""Repetition in a sequence of ids: how much of it has been there before, and whether it loops."""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 4
ROUNDS = 3
LEAST = 24  # tokens: a list of three short lines is no loop


def repeated(ids: Sequence[int]) -> float:
    """The fraction of runs of four tokens that have occurred before; 0 for fewer tokens."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(ids: Sequence[int]) -> bool:
    """Whether it ends in the same thing three times or more, over 24 tokens at least."""
    longest = len(ids) // ROUNDS
    return any(
        _rounds(ids, period) >= max(ROUNDS, LEAST / period) for period in range(1, longest + 1)
    )


def _rounds(ids: Sequence[int], period: int) -> float:
    """How often the last `period` ids stand at the end, parts of a time included."""
    equal = 0
    while equal < len(ids) - period and ids[-1 - equal] == ids[-1 - equal - period]:
        equal += 1
    return 1 + equal / period
