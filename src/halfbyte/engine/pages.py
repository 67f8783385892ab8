"""Who owns which page: an allocator of integers, without any memory behind it.

Pages of the full layers and rings of the sliding layers are both handed out here. It knows nothing
of sequences or tensors. Everything a sequence needs is taken at its admission, so allocation never
fails in the middle of one; the price is that memory reserved for a long answer waits unused.
"""

from __future__ import annotations


class PageAllocator:
    """Hands out the integers of [0, num_pages), each to one owner at a time."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._held: set[int] = set()

    @property
    def available(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int]:
        """`count` pages that nobody holds. The caller has made sure that they are `available`."""
        if count > len(self._free):
            raise AssertionError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._held.update(pages)
        return pages

    def free(self, pages: list[int]) -> None:
        """Give back pages, each held; all or none are taken back."""
        returned = set(pages)
        if len(returned) < len(pages) or not returned <= self._held:
            raise AssertionError(f"pages {pages} are not all held: freed twice or never given")
        self._held -= returned
        self._free.extend(reversed(pages))

    def check_integrity(self) -> None:
        """Every page is either free or held, and exactly once."""
        if sorted([*self._free, *self._held]) != list(range(self.num_pages)):
            raise AssertionError(f"free {sorted(self._free)}, held {sorted(self._held)}")
