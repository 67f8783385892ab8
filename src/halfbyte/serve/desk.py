"""Where asyncio meets the engine's thread: requests go over, events come back, nobody blocks.

So many requests are let in as run at once, and a number that waits; the next one is told to come
back later. To be let in and to be handed over are one step of the loop, so the bound is never
passed. Whoever leaves early is cancelled before the next step. When the server goes down nobody is
let in any more, and those who are in may finish.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from time import monotonic

from halfbyte.engine import Event, Worker
from halfbyte.errors import HalfbyteError
from halfbyte.serve.failure import Failure, failure_of, refused
from halfbyte.specs import Request

News = tuple[int, Sequence[Event], Exception | None]
# What a request takes, before any was timed, and how fast that is forgotten.
GUESS_S, MEMORY = 5.0, 0.8
LONGEST_S = 60  # that anybody is told to wait


class Desk:
    """Hands requests to a worker: `parallel` run at once, `waiting` more may wait."""

    def __init__(self, worker: Worker, *, parallel: int, waiting: int, request_s: float) -> None:
        self.worker = worker
        self._parallel = parallel
        self._most = parallel + waiting
        self._request_s = request_s
        self._usual_s = GUESS_S
        self.live = 0
        self.closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self, requests: Sequence[Request]) -> Visit:
        """Lets requests in, all or none, and hands them over. Call it from the loop.

        Raises `Failure` where there is no room now or never, and for what could never run.
        """
        self.require_open()
        count = len(requests)
        if count > self._most:
            raise refused(f"{count} answers in one request; at most {self._most} here", "n")
        if self.live + count > self._most:
            raise self._full()
        visit = Visit(self.worker, monotonic() + self._request_s, self._request_s)
        try:
            for index, request in enumerate(requests):
                visit.submit(index, request, self._leave)
                self.live += 1
                self._idle.clear()
        except HalfbyteError as error:
            visit.leave()
            raise failure_of(error) from error
        return visit

    def require_open(self) -> None:
        """Raises `Failure` when nobody is let in any more."""
        if self.closing:
            raise Failure(
                503, "the server is shutting down", "shutting_down", headers={"retry-after": "10"}
            )

    async def drained(self, timeout_s: float) -> bool:
        """Lets nobody in any more; whether all who were in have finished in time."""
        self.closing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self.live

    def _full(self) -> Failure:
        after = round(self._usual_s * self.live / self._parallel)
        return Failure(
            429,
            f"{self.live} requests are running or waiting; try again later",
            "queue_full",
            headers={"retry-after": str(min(LONGEST_S, max(1, after)))},
        )

    def _leave(self, seconds: float) -> None:
        self.live -= 1
        self._usual_s = MEMORY * self._usual_s + (1 - MEMORY) * seconds
        if not self.live:
            self._idle.set()


class Visit:
    """Requests that were let in together, until the last has ended or all were given up."""

    def __init__(self, worker: Worker, deadline: float, request_s: float) -> None:
        self._worker = worker
        self._deadline = deadline
        self._request_s = request_s
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News] = asyncio.Queue()
        self._tickets: dict[int, int] = {}

    def submit(self, index: int, request: Request, left: Callable[[float], None]) -> None:
        """Hands one over; `left` is called in the loop when it has ended, with its seconds."""
        began = monotonic()

        def arrive(events: Sequence[Event], error: Exception | None) -> None:
            if events[-1].completion is not None:
                left(monotonic() - began)
            self._news.put_nowait((index, events, error))

        def sink(events: Sequence[Event], error: Exception | None) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is there to be told
                self._loop.call_soon_threadsafe(arrive, events, error)

        self._tickets[index] = self._worker.submit(request, sink)

    async def news(self, enough: Callable[[int], bool]) -> AsyncGenerator[News]:
        """The events of requests as they come, with the request's index, to the last one's end.

        Of which there is `enough`, and all if this is left early, is cancelled. Raises `Failure`.
        """
        try:
            while self._tickets:
                item = await self._next()
                if item[1][-1].completion is not None:
                    self._tickets.pop(item[0])
                yield item
                if item[0] in self._tickets and enough(item[0]):
                    self._worker.cancel(self._tickets[item[0]])
        finally:
            self.leave()

    def leave(self) -> None:
        """Gives up what has not ended."""
        for ticket in self._tickets.values():
            self._worker.cancel(ticket)
        self._tickets.clear()

    async def _next(self) -> News:
        if not self._news.empty():
            return self._news.get_nowait()
        try:
            async with asyncio.timeout(self._deadline - monotonic()):
                return await self._news.get()
        except TimeoutError:
            raise Failure(
                503, f"the request took more than {self._request_s:.0f} seconds", "timeout"
            ) from None
