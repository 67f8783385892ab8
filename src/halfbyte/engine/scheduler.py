"""Who runs next: integers only.

Requests wait in the order they came, but of several clients the one with the fewest running goes
first. One is admitted when a ring is free and the pages for its whole length are, so nothing that
runs can run out; what is kept of ended sequences makes room. A step takes one row of every sequence
that decodes, and spends a number of rows on those with more pending, the oldest first: a long
prompt delays the others by one chunk per token, never by its length.

A sequence begins where the cache still holds its beginning (`prefix`), and one that begins like
another whose prompt is under way waits for that: the rows would come no sooner.

It never preempts; the price is that a long request at the head of the queue holds back a short one
behind it.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from dataclasses import dataclass, replace

from halfbyte.engine.pages import PageAllocator
from halfbyte.engine.prefix import SHORTEST, Kept, PrefixCache
from halfbyte.engine.sequence import Event, Sequence
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.models.cache import DRAFT_ROWS, CacheShape, Slot
from halfbyte.specs import Request, common


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The next `count` pending ids of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """Cells that a sequence may begin with: `length` positions in `pages`, and whose ring.

    `kept`: what they are of, if that has ended; `whole`: nearly all of it, which is taken over.
    """

    length: int = 0
    pages: tuple[int, ...] = ()
    ring: int | None = None
    kept: Kept | None = None
    whole: bool = False


class Scheduler:
    """The queue, the running sequences, and what they hold of the cache.

    `most_running` sequences at once; by default as many as there are rings. `ring_len` is that of
    the cache. `keeps`: what sequences computed is kept for others. `copies` are rings to be copied,
    in order, before the next step.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        context: int,
        prefill_chunk: int,
        most_running: int | None = None,
        ring_len: int | None = None,
        keeps: bool = False,
    ) -> None:
        self.context = context
        self.prefill_chunk = prefill_chunk
        self.page_len = shape.page_len
        self.pages = PageAllocator(shape.pages)
        self.rings = PageAllocator(shape.rings)
        self.prefix = PrefixCache(ring_len, shape.ring_slack)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.copies: list[tuple[int, int]] = []
        self._most_running = most_running or shape.rings
        self._keeps = keeps
        self._next_number = 0

    def add(self, request: Request, outbox: list[Event]) -> Sequence:
        """Put a request at the end of the queue; refuse one that could never run (`limit`)."""
        sequence = Sequence(
            number=self._next_number,
            request=request,
            limit=self.limit(request),
            outbox=outbox,
            ids=list(request.prompt_ids),
            slot=Slot(),
        )
        self._next_number += 1
        self.waiting.append(sequence)
        return sequence

    def limit(self, request: Request) -> int:
        """How many ids its sequence may have; raises for one that could never run.

        The context counts computed positions. A token is chosen from every one of them, so a
        sequence ends with at most `context + 1` ids, of which the last is never computed.
        """
        prompt_len = len(request.prompt_ids)
        if prompt_len > self.context:
            raise InvalidInputError(
                f"the prompt has {prompt_len} tokens; the context holds {self.context}",
                hint=f"shorten the prompt, or give --context {prompt_len} or more",
            )
        limit = self.context + 1
        if request.max_tokens is not None:
            limit = min(limit, prompt_len + request.max_tokens)
        self._refuse_oversized(limit - 1)
        return limit

    def schedule(self, rows: int | None = None) -> list[Work]:
        """Admit who fits, and say what the next step computes; empty when nobody is left.

        `rows` of prompts at most, unless nobody decodes.
        """
        self._admit()
        decoding = any(sequence.pending == 1 for sequence in self.running)
        budget = min(rows or self.prefill_chunk, self.prefill_chunk)
        budget = budget if decoding else self.prefill_chunk
        work: list[Work] = []
        for sequence in self.running:
            count = sequence.pending
            if count > 1:
                count = min(count, budget, _most_rows(sequence))
                budget -= count
            if count:
                self._preserve(sequence, count)
                work.append(Work(sequence=sequence, count=count))
        return work

    def remove(self, sequence: Sequence, *, keep: bool = False) -> None:
        """Take a sequence out, wherever it is, and everything it holds back.

        `keep`: its cells are as they should be, and may serve others.
        """
        if sequence in self.running:
            self.running.remove(sequence)
            if keep and self._keeps and sequence.slot.length >= SHORTEST:
                self._keep(sequence)
            else:
                self._release(sequence.slot.pages, sequence.slot.ring)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def forget(self) -> None:
        """Give up what is kept of sequences that ended."""
        while self.prefix.kept:
            self._evict()

    def check_integrity(self) -> None:
        """What is held is exactly what the running sequences and what is kept hold."""
        self.pages.check_integrity()
        self.rings.check_integrity()
        kept = self.prefix.kept
        held = sum(len(it.slot.pages) for it in self.running) + sum(len(it.pages) for it in kept)
        if held != self.pages.held:
            raise AssertionError(f"{held} pages should be held, {self.pages.held} are")
        rings = len(self.running) + sum(it.ring is not None for it in kept)
        if rings != self.rings.held:
            raise AssertionError(f"{rings} rings should be held, {self.rings.held} are")

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._most_running:
            sequence = self._next()
            beginning = self._beginning(sequence)
            if beginning is None or not self._place(sequence, beginning):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _next(self) -> Sequence:
        """The first of the client with the fewest running."""
        busy = Counter(sequence.request.client for sequence in self.running)
        return min(self.waiting, key=lambda sequence: busy[sequence.request.client])

    def _beginning(self, sequence: Sequence) -> Beginning | None:
        """The longest beginning that is in the cache; None if a longer one is on its way."""
        if not self._keeps or sequence.request.prompt_logprobs:
            return Beginning()
        found = [self._of_kept(sequence, kept) for kept in self.prefix.of(sequence.request.adapter)]
        alike = [it for it in self.running if it.request.adapter == sequence.request.adapter]
        found += [self._of_running(sequence, other) for other in alike]
        best = max(found, key=lambda it: it.length, default=Beginning())
        for other in alike:
            shared = self._whole(common(sequence.request.prompt_ids, other.request.prompt_ids))
            shared = min(shared, self._whole(len(sequence.ids) - 1))
            if not other.chosen and max(best.length, other.slot.length) < shared:
                self._mark(other, shared)
                return None
        return best

    def _of_kept(self, sequence: Sequence, kept: Kept) -> Beginning:
        length = min(common(kept.ids, sequence.request.prompt_ids), len(sequence.ids) - 1)
        page = length // self.page_len
        whole = len(kept.ids) - length <= self.page_len
        if not whole or (length % self.page_len and self.pages.is_shared(kept.pages[page])):
            length = self._whole(length)
        found = self._checked(sequence, length, kept.written, kept.pages, kept.ring)
        return replace(found, kept=kept, whole=whole) if found.length else found

    def _of_running(self, sequence: Sequence, other: Sequence) -> Beginning:
        slot = other.slot
        length = common(tuple(other.ids[: slot.length]), sequence.request.prompt_ids)
        length = self._whole(min(length, len(sequence.ids) - 1))
        return self._checked(sequence, length, slot.written, slot.pages, slot.ring)

    def _checked(
        self,
        sequence: Sequence,
        length: int,
        written: int,
        pages: list[int],
        ring: int | None,
    ) -> Beginning:
        """A beginning, if its ring still serves; if not, the place is marked for the next time."""
        if length < SHORTEST:
            return Beginning()
        if not self.prefix.reaches(written, length):
            self._mark(sequence, self._whole(length))
            return Beginning()
        own = -(-length // self.page_len)
        return Beginning(length=length, pages=tuple(pages[:own]), ring=ring)

    def _place(self, sequence: Sequence, beginning: Beginning) -> bool:
        """Gives a sequence its cells, if there are enough."""
        total = self._pages_for(sequence.limit - 1)
        begun, kept = list(beginning.pages), beginning.kept
        busy = {page for other in self.running for page in other.slot.pages} | {*begun}
        if total - len(begun) > self.pages.num_pages - len(busy):
            return False
        self.pages.share(begun)
        if kept is not None:
            self.prefix.use(kept)
        if kept is not None and beginning.whole:
            self._drop(kept)
        while self.pages.available < total - len(begun) or not self.rings.available:
            self._evict()
        ring = self.rings.alloc(1)[0]
        source = beginning.ring
        if source is not None and source != ring and self.prefix.ring_len is not None:
            self.copies.append((source, ring))
        length = sequence.cached = beginning.length
        pages = [*begun, *self.pages.alloc(total - len(begun))]
        sequence.slot = Slot(pages=pages, ring=ring, length=length, written=length)
        if self._keeps:
            self._mark(sequence, self._whole(len(sequence.ids) - 1))
        return True

    def _preserve(self, sequence: Sequence, count: int) -> None:
        """Keeps what is marked, where this step would overwrite the ring that goes with it."""
        slot, prefix = sequence.slot, self.prefix
        after = slot.length + count + DRAFT_ROWS
        for mark in [mark for mark in sequence.marks if not prefix.reaches(after, mark)]:
            sequence.marks.remove(mark)
            if mark <= slot.length and prefix.reaches(slot.written, mark):
                self._keep_beginning(sequence, mark)

    def _keep_beginning(self, sequence: Sequence, length: int) -> None:
        """A copy of the ring, while it still serves; not at the price of what is worth more."""
        least = self.prefix.least()
        if not self.rings.available and (least is None or least.worth > self.prefix.worth(length)):
            return
        if not self.rings.available:
            self._evict()
        slot = sequence.slot
        ring = self.rings.alloc(1)[0]
        self.copies.append((slot.ring, ring))
        self.prefix.add(
            Kept(
                ids=tuple(sequence.ids[:length]),
                adapter=sequence.request.adapter,
                pages=self.pages.share(slot.pages[: length // self.page_len]),
                ring=ring,
                written=slot.written,
            )
        )

    def _keep(self, sequence: Sequence) -> None:
        """What an ended sequence computed; what it contains is not worth keeping beside it."""
        slot, ring = sequence.slot, sequence.slot.ring
        used = -(-slot.length // self.page_len)
        self.pages.free(slot.pages[used:])
        if self.prefix.ring_len is None:
            self.rings.free([ring])
            ring = None
        kept = Kept(
            ids=tuple(sequence.ids[: slot.length]),
            adapter=sequence.request.adapter,
            pages=slot.pages[:used],
            ring=ring,
            written=slot.written,
        )
        for other in [*self.prefix.of(kept.adapter)]:
            if self._contains(kept, other):
                self._drop(other)
        self.prefix.add(kept)

    def _contains(self, kept: Kept, other: Kept) -> bool:
        length = len(other.ids)
        return kept.ids[:length] == other.ids and self.prefix.reaches(kept.written, length)

    def _drop(self, kept: Kept) -> None:
        self.prefix.kept.remove(kept)
        self._release(kept.pages, kept.ring)

    def _evict(self) -> None:
        kept = self.prefix.evict()
        self._release(kept.pages, kept.ring)

    def _release(self, pages: list[int], ring: int | None) -> None:
        self.pages.free(pages)
        if ring is not None:
            self.rings.free([ring])

    def _mark(self, sequence: Sequence, length: int) -> None:
        if self.prefix.ring_len is not None and length >= SHORTEST:
            sequence.marks = sorted({*sequence.marks, length})

    def _whole(self, positions: int) -> int:
        """Positions in whole pages."""
        return positions // self.page_len * self.page_len

    def _refuse_oversized(self, positions: int) -> None:
        if self._pages_for(positions) > self.pages.num_pages:
            raise DoesNotFitError(
                f"the request needs {positions} positions of cache; "
                f"all of it holds {self.pages.num_pages * self.page_len}",
                hint="lower --max-tokens, shorten the prompt, or plan for more cache",
            )

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_len)


def _most_rows(sequence: Sequence) -> int:
    """Of a prompt in a step: where each row's logits are wanted, as many as a round of drafts."""
    return DRAFT_ROWS if sequence.request.prompt_logprobs else sys.maxsize
