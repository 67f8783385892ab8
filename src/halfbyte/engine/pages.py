"""Who owns which page: an allocator of integers, without any memory behind it.

Pages of the full layers and rings of the sliding layers are both handed out here. It knows nothing
of sequences or tensors. Sequences that begin alike share the pages of their beginning: a page is
free again when its last holder gives it back. Everything a sequence needs is taken at its
admission, so allocation never fails in the middle of one; the price is that memory reserved for a
long answer waits unused.
"""

from __future__ import annotations


class PageAllocator:
    """Hands out the integers of [0, num_pages), each to one holder, who may share it."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(reversed(range(num_pages)))
        self._holders: dict[int, int] = {}

    @property
    def available(self) -> int:
        return len(self._free)

    def alloc(self, count: int) -> list[int]:
        """`count` pages that nobody holds. The caller has made sure that they are `available`."""
        if count > len(self._free):
            raise AssertionError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """One more holder for each of these pages, which are held."""
        for page in pages:
            self._holders[page] += 1
        return pages

    def is_shared(self, page: int) -> bool:
        """Whether a page that is held has several holders."""
        return self._holders[page] > 1

    def free(self, pages: list[int]) -> None:
        """One holder gives back pages, each held; all or none are taken back."""
        returned = set(pages)
        if len(returned) < len(pages) or not returned <= self._holders.keys():
            raise AssertionError(f"pages {pages} are not all held: freed twice or never given")
        for page in reversed(pages):
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._free.append(page)

    def check_integrity(self) -> None:
        """Every page is either free or held, and exactly once."""
        if sorted([*self._free, *self._holders]) != list(range(self.num_pages)):
            raise AssertionError(f"free {sorted(self._free)}, held {sorted(self._holders)}")

    @property
    def held(self) -> int:
        """The number of pages held, each counted once for every holder."""
        return sum(self._holders.values())
