"""What sequences that ended left in the cache, for those that begin as they did.

The keys and values of a position are a function of the ids up to it (and of the adapter), so a
sequence may take over the cells of another as far as their ids agree: its tokens are the same, only
sooner. Kept are the pages of full layers, which are shared, and a ring of the sliding ones, which
holds the last positions only: it serves a beginning that ends near where it was written to.

Nothing here is memory of its own: all of it is given up as soon as a sequence needs it, the least
worth first. Worth is what would have to be computed again, and it ages (GreedyDual: Young 1994), so
many short conversations do not push out a long one that is still used. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

# Less is computed again sooner than it is looked up.
SHORTEST = 32


@dataclass(slots=True, eq=False)
class Kept:
    """Cells of `[0, len(ids))` in `pages`; the `ring` was written up to `written`."""

    ids: tuple[int, ...]
    adapter: str | None
    pages: list[int]
    ring: int | None
    written: int
    worth: float = 0.0


@dataclass(slots=True)
class PrefixCache:
    """Everything kept. `ring_len`: of the shortest ring, None where no layer slides; `slack`: how
    far back from where it was written a ring still serves."""

    ring_len: int | None
    slack: int
    kept: list[Kept] = field(default_factory=list[Kept])
    _age: float = 0.0

    def reaches(self, written: int, length: int) -> bool:
        """Whether a ring written so far still has all that position `length` sees."""
        if self.ring_len is None:
            return True
        return written - length <= self.slack or written <= self.ring_len

    def add(self, kept: Kept) -> None:
        """Keeps it."""
        self.use(kept)
        self.kept.append(kept)

    def use(self, kept: Kept) -> None:
        """It was of use just now."""
        kept.worth = self.worth(len(kept.ids))

    def worth(self, length: int) -> float:
        """What a beginning of this length would be worth now."""
        return self._age + length

    def least(self) -> Kept | None:
        """What is worth the least."""
        return min(self.kept, key=lambda it: it.worth, default=None)

    def evict(self) -> Kept:
        """Forgets what is worth the least; what is left has aged by that."""
        least = min(self.kept, key=lambda it: it.worth)
        self.kept.remove(least)
        self._age = max(self._age, least.worth)
        return least

    def of(self, adapter: str | None) -> Iterator[Kept]:
        """What was computed with an adapter."""
        return (kept for kept in self.kept if kept.adapter == adapter)
