"""What followed the last time: the longest earlier occurrence of a sequence's end, in integers.

Text repeats itself: names, quoted code, the prompt in the answer. An index from the last `KEY` ids
to where they stood finds the candidates; of the nearest ones the longest match wins, the nearer
among equals. What followed it is the draft; where it runs into the end of the sequence it repeats,
as the match says it would.

Of old drafting without a model see Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

KEY = 3
LONGEST = 32
CANDIDATES = 16


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` ids stood `distance` ids before, too."""

    length: int
    distance: int

    def continued(self, ids: Sequence[int], count: int) -> list[int]:
        """What the next `count` ids would be if it went on like that."""
        drafts: list[int] = []
        for _ in range(count):
            place = len(drafts) - self.distance
            drafts.append(ids[place] if place < 0 else drafts[place])
        return drafts


class Index:
    """Where every run of `KEY` ids of one growing sequence ended, the latest first."""

    def __init__(self) -> None:
        self._latest: dict[tuple[int, ...], int] = {}
        self._before: list[int] = []  # of the run that ends at each place: where it ended before

    def find(self, ids: Sequence[int]) -> Match | None:
        """The longest match of the end of `ids`, which has grown since the last call or not."""
        for end in range(len(self._before), len(ids)):
            run = tuple(ids[max(0, end + 1 - KEY) : end + 1])
            self._before.append(self._latest.get(run, -1))
            self._latest[run] = end
        best: Match | None = None
        last = len(ids) - 1
        place = self._before[last] if len(ids) >= KEY else -1
        for _ in range(CANDIDATES):
            if place < 0 or (best is not None and best.length == LONGEST):
                break
            length = _common(ids, place, last)
            if best is None or length > best.length:
                best = Match(length, last - place)
            place = self._before[place]
        return best


def _common(ids: Sequence[int], one: int, other: int) -> int:
    """How many ids agree backwards from two places on, up to `LONGEST`."""
    length = KEY
    while length < min(LONGEST, one + 1) and ids[one - length] == ids[other - length]:
        length += 1
    return length
