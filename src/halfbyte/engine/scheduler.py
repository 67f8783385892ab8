"""Who runs next: integers only.

Requests wait in the order they came. One is admitted when a ring is free and the pages for its
whole length are, so nothing that runs can run out. A step takes one row of every sequence that
decodes, and spends `prefill_chunk` rows on those with more pending, the oldest first: a long
prompt delays the others by one chunk per token, never by its length.

It never preempts and never reorders; the price is that a long request at the head of the queue
holds back a short one behind it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from halfbyte.engine.pages import PageAllocator
from halfbyte.engine.sequence import Event, Sequence
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.specs import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The next `count` pending ids of a sequence, to be computed in this step."""

    sequence: Sequence
    count: int


class Scheduler:
    """The queue, the running sequences, and what they hold of the cache."""

    def __init__(self, shape: CacheShape, *, context: int, prefill_chunk: int) -> None:
        self.context = context
        self.prefill_chunk = prefill_chunk
        self.page_len = shape.page_len
        self.pages = PageAllocator(shape.pages)
        self.rings = PageAllocator(shape.rings)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._next_number = 0

    def add(self, request: Request, outbox: list[Event]) -> Sequence:
        """Put a request at the end of the queue; refuse one that could never run.

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
        sequence = Sequence(
            number=self._next_number,
            request=request,
            limit=limit,
            outbox=outbox,
            ids=list(request.prompt_ids),
            slot=Slot(),
        )
        self._next_number += 1
        self.waiting.append(sequence)
        return sequence

    def schedule(self) -> list[Work]:
        """Admit who fits, and say what the next step computes; empty when nobody is left."""
        self._admit()
        budget = self.prefill_chunk
        work: list[Work] = []
        for sequence in self.running:
            count = sequence.pending
            if count > 1:
                count = min(count, budget)
                budget -= count
            if count:
                work.append(Work(sequence=sequence, count=count))
        return work

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and everything it holds back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pages.free(sequence.slot.pages)
            self.rings.free([sequence.slot.ring])
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def check_integrity(self) -> None:
        """What is held is exactly what the running sequences hold, and enough for each."""
        self.pages.check_integrity()
        self.rings.check_integrity()
        held = sum(len(sequence.slot.pages) for sequence in self.running)
        if held != self.pages.num_pages - self.pages.available:
            raise AssertionError(f"running sequences hold {held} pages")
        if len(self.running) != self.rings.num_pages - self.rings.available:
            raise AssertionError(f"{len(self.running)} running sequences hold rings")

    def _admit(self) -> None:
        while self.waiting and self.rings.available:
            sequence = self.waiting[0]
            needed = self._pages_for(sequence.limit - 1)
            if needed > self.pages.available:
                return
            self.waiting.popleft()
            sequence.slot = Slot(pages=self.pages.alloc(needed), ring=self.rings.alloc(1)[0])
            self.running.append(sequence)

    def _refuse_oversized(self, positions: int) -> None:
        if self._pages_for(positions) > self.pages.num_pages:
            raise DoesNotFitError(
                f"the request needs {positions} positions of cache; "
                f"all of it holds {self.pages.num_pages * self.page_len}",
                hint="lower --max-tokens, shorten the prompt, or plan for more cache",
            )

    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.page_len)
