"""The engine: requests of token ids go in, events of token ids come out, a step at a time.

Every step is one forward over whoever the scheduler picked (continuous batching). The tokens of a
request do not depend on what runs beside it. No text and no tensors here, and no threads: one
caller at a time. A step that is interrupted or fails ends the sequences that were in it ("abort"),
and the engine goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from halfbyte.engine.drafting import Clock, Drafting
from halfbyte.engine.runner import Runner
from halfbyte.engine.scheduler import Scheduler, Work
from halfbyte.engine.sequence import Completion, Event, Sequence
from halfbyte.errors import InvalidInputError
from halfbyte.models.cache import shape_for
from halfbyte.models.decoder import Decoder
from halfbyte.specs import KVType, Request

# A step with prompts should not keep those who decode waiting longer; fewer rows cost as much.
PATIENCE_S = 0.25
FEWEST_ROWS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Sequences that run and wait; pages there are, pages held, and those of them that are kept of
    ended sequences."""

    running: int
    waiting: int
    pages: int
    pages_held: int
    pages_kept: int


class Engine:
    """Runs requests on one decoder, at most `max_sequences` of them at once.

    `context` bounds the positions of one sequence, `prefill_chunk` the rows of prompts in a step.
    `pages` of 64 positions are shared by all; by default they suffice for `max_sequences`
    full contexts. With `keeps`, what a sequence computed is kept for others that begin as it did,
    until its room is needed; `spare` rings more than sequences make room for that. `drafting` and
    `keeps` change how fast tokens come, never which. Raises `InvalidInputError` for values outside
    their range.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        context: int,
        max_sequences: int = 1,
        prefill_chunk: int = 512,
        kv: KVType = "bf16",
        pages: int | None = None,
        spare: int = 0,
        keeps: bool = False,
        drafting: Drafting | None = None,
        clock: Clock = perf_counter,
    ) -> None:
        _at_least_one(context=context, max_sequences=max_sequences, prefill_chunk=prefill_chunk)
        if context > decoder.spec.context:
            raise InvalidInputError(
                f"a context of {context} is beyond the model's {decoder.spec.context}",
                hint=f"give --context {decoder.spec.context} or less",
            )
        prefill_chunk = min(prefill_chunk, context)
        shape = shape_for(
            context=context,
            sequences=max_sequences,
            rows=prefill_chunk,
            kind=kv,
            pages=pages,
            spare=spare,
        )
        if drafting is not None and drafting.rows > shape.ring_slack:
            raise InvalidInputError(
                f"{drafting.rows} rows in a round of drafts; the rings have {shape.ring_slack} "
                "cells to spare",
                hint=f"give --draft {shape.ring_slack - 1} or less",
            )
        self._vocab = decoder.spec.vocab
        self._adapters = decoder.adapters
        cache = decoder.new_cache(shape)
        wanted = max_sequences * (1 if drafting is None else drafting.rows)
        cache.prepare(prefill_chunk + wanted, wanted, max_sequences)
        for drafter in () if drafting is None else drafting.drafters:
            drafter.prepare(cache, max_sequences)
        self._runner: Runner | None = Runner(decoder, cache, drafting, clock)
        self._scheduler = Scheduler(
            shape,
            context=context,
            prefill_chunk=prefill_chunk,
            most_running=max_sequences,
            ring_len=self._runner.ring_len,
            keeps=keeps,
        )
        self._clock = clock
        self._row_s = 0.0
        self._live: dict[int, Sequence] = {}
        self._outbox: list[Event] = []

    @property
    def cache_bytes(self) -> int:
        """The size of the cache; 0 when closed."""
        return 0 if self._runner is None else self._runner.cache_bytes

    @property
    def busy(self) -> bool:
        """Is any sequence unfinished, or any event not yet returned by `step`?"""
        return bool(self._live or self._outbox)

    @property
    def usage(self) -> Usage:
        """Who runs and waits, and what is held of the cache."""
        scheduler = self._scheduler
        return Usage(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=scheduler.pages.num_pages,
            pages_held=scheduler.pages.num_pages - scheduler.pages.available,
            pages_kept=len({page for kept in scheduler.prefix.kept for page in kept.pages}),
        )

    def check(self, request: Request) -> None:
        """Refuse what could never run; may be called from any thread.

        Raises `InvalidInputError` for ids outside the vocabulary, a prompt beyond the context or an
        adapter that is not loaded, `DoesNotFitError` for one that the whole cache could not hold.
        """
        _known_ids("prompt", request.prompt_ids, self._vocab)
        _known_ids("list of suppressed ids", request.sampling.suppress, self._vocab)
        _known_ids("logit bias", (token for token, _ in request.sampling.bias), self._vocab)
        if request.adapter is not None and request.adapter not in self._adapters:
            loaded = ", ".join(self._adapters) or "none"
            raise InvalidInputError(
                f"there is no adapter '{request.adapter}'", hint=f"loaded: {loaded}"
            )
        self._scheduler.limit(request)

    def add(self, request: Request, outbox: list[Event] | None = None) -> int:
        """Queue a request; returns its number. Its events come from `step` or, where an `outbox` is
        given, go there. Raises what `check` does."""
        return self._add(request, self._outbox if outbox is None else outbox).number

    def forget(self) -> None:
        """Give up what is kept of sequences that ended."""
        self._scheduler.forget()

    def step(self) -> list[Event]:
        """Run one forward and return what happened, also to sequences aborted since the last."""
        self.advance()
        events = self._outbox.copy()
        self._outbox.clear()
        return events

    def abort(self, number: int) -> None:
        """End a sequence now; what it held is free at once. Nothing happens if it has ended."""
        if number in self._live:
            self._end(self._live[number], keep=True)

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Run requests to their ends, as many at once as fit; completions in the order given."""
        outboxes: list[list[Event]] = []
        sequences: list[Sequence] = []
        try:
            for request in requests:
                outboxes.append([])
                sequences.append(self._add(request, outboxes[-1]))
            while any(sequence.number in self._live for sequence in sequences):
                self.advance()
        finally:
            self._end(*sequences)
        return [_completion(outbox) for outbox in outboxes]

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one request as they come; the first `next` queues it.

        A stream that is closed or fails aborts its sequence. Streams may be interleaved.
        """
        outbox: list[Event] = []
        sequence = self._add(request, outbox)
        try:
            while outbox or sequence.number in self._live:
                if not outbox:
                    self.advance()
                while outbox:
                    yield outbox.pop(0)
        finally:
            self._end(sequence, keep=True)

    def close(self) -> None:
        """Abort everything and let go of the decoder and the cache."""
        self._end(*self._live.values())
        self.forget()
        self._runner = None

    def check_integrity(self) -> None:
        """No page or ring is lost, shared, or held by a sequence that has ended."""
        self._scheduler.check_integrity()
        known = {*self._scheduler.waiting, *self._scheduler.running}
        if known != set(self._live.values()):
            raise AssertionError(f"{len(known)} sequences scheduled, {len(self._live)} live")

    def _add(self, request: Request, outbox: list[Event]) -> Sequence:
        self.check(request)
        sequence = self._scheduler.add(request, outbox)
        self._live[sequence.number] = sequence
        return sequence

    def advance(self) -> None:
        """Run one forward; events go to the outboxes of their requests."""
        if self._runner is None:
            raise AssertionError("the engine is closed")
        work = self._scheduler.schedule(self._prompt_rows())
        if not work:
            return
        before = [item.sequence.slot.length for item in work]
        try:
            self._run(self._runner, work)
        except MemoryError:
            self._shed(work, before)
        except BaseException:
            self._end(*(item.sequence for item in work))
            raise

    def _prompt_rows(self) -> int | None:
        """How many rows of prompts keep those who decode from waiting long; None: unknown."""
        if not self._row_s:
            return None
        rows = int(PATIENCE_S / self._row_s) // FEWEST_ROWS * FEWEST_ROWS
        return max(FEWEST_ROWS, rows)

    def _shed(self, work: list[Work], before: list[int]) -> None:
        """A step had not enough memory: its longest prompt, or its last sequence, ends; the others
        take the step back."""
        for item, length in zip(work, before, strict=True):
            item.sequence.slot.rollback(item.sequence.slot.length - length)
        last = max(work, key=lambda item: (item.count, item.sequence.number)).sequence
        last.finish("memory")
        self._end(last)

    def _run(self, runner: Runner, work: list[Work]) -> None:
        start = self._clock()
        for source, target in self._scheduler.copies:
            runner.copy_ring(source, target)
        self._scheduler.copies.clear()
        tokens = runner.run(work)
        seconds = self._clock() - start
        rows = sum(item.count for item in work)
        if rows >= FEWEST_ROWS:
            self._row_s = seconds / rows
        for item, chosen in zip(work, tokens, strict=True):
            item.sequence.spend(seconds)
            item.sequence.commit(chosen)
            if item.sequence.finish_reason is not None:
                self._end(item.sequence, keep=True)

    def _end(self, *sequences: Sequence, keep: bool = False) -> None:
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.finish("abort")
            self._scheduler.remove(sequence, keep=keep)
            self._live.pop(sequence.number, None)


def _completion(outbox: list[Event]) -> Completion:
    completion = outbox[-1].completion
    if completion is None:
        raise AssertionError(f"the last event is no end: {outbox[-1]}")
    return completion


def _known_ids(what: str, ids: Iterable[int], vocab: int) -> None:
    for token in ids:
        if not 0 <= token < vocab:
            raise InvalidInputError(f"the {what} has id {token}; the vocabulary is [0, {vocab})")


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InvalidInputError(f"{name} is {size}; it must be at least 1")
