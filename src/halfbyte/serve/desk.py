"""Where asyncio meets the engine's thread: requests go over, events come back, nobody blocks.

So many requests are let in as run at once, and a number that waits; the next one is told to come
back later. Whoever leaves early is cancelled before the next step. When the server goes down
nobody is let in any more, and those who are in may finish.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from time import monotonic

from halfbyte.engine import Event, Worker
from halfbyte.errors import HalfbyteError
from halfbyte.serve.failure import Failure, failure_of
from halfbyte.specs import Request

News = tuple[int, Sequence[Event], Exception | None]
# What a request takes, before any was timed, and how fast that is forgotten.
GUESS_S, MEMORY = 5.0, 0.8


class Desk:
    """Hands requests to a worker: `parallel` run at once, `waiting` more may wait."""

    def __init__(self, worker: Worker, *, parallel: int, waiting: int, request_s: float) -> None:
        self.worker = worker
        self._parallel = parallel
        self._waiting = waiting
        self._request_s = request_s
        self._usual_s = GUESS_S
        self.live = 0
        self.closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self, count: int) -> None:
        """Raises `Failure` where `count` more requests cannot be let in now. Ask before `run`."""
        if self.closing:
            raise Failure(
                503, "the server is shutting down", "shutting_down", headers={"retry-after": "10"}
            )
        # A fan of answers to one request is let in whole, where anything is.
        if self.live and self.live + count > self._parallel + self._waiting:
            after = round(self._usual_s * self.live / self._parallel)
            raise Failure(
                429,
                f"{self.live} requests are running or waiting; try again later",
                "queue_full",
                headers={"retry-after": str(min(60, max(1, after)))},
            )

    async def run(
        self, requests: Sequence[Request], enough: Callable[[int], bool]
    ) -> AsyncGenerator[News]:
        """The events of requests as they come, with the request's index, to the last one's end.

        Of which there is `enough`, and all if this is left early, is cancelled. Raises `Failure`.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[News] = asyncio.Queue()
        tickets: dict[int, int] = {}
        try:
            for index, request in enumerate(requests):
                tickets[index] = self._submit(loop, news, index, request)
            deadline = monotonic() + self._request_s
            while tickets:
                item = await self._next(news, deadline)
                if item[1][-1].completion is not None:
                    tickets.pop(item[0])
                yield item
                if item[0] in tickets and enough(item[0]):
                    self.worker.cancel(tickets[item[0]])
        finally:
            for ticket in tickets.values():
                self.worker.cancel(ticket)

    async def drained(self, timeout_s: float) -> bool:
        """Lets nobody in any more; whether all who were in have finished in time."""
        self.closing = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return not self.live

    def _submit(
        self,
        loop: asyncio.AbstractEventLoop,
        news: asyncio.Queue[News],
        index: int,
        request: Request,
    ) -> int:
        began = monotonic()

        def arrive(events: Sequence[Event], error: Exception | None) -> None:
            if events[-1].completion is not None:
                self._leave(monotonic() - began)
            news.put_nowait((index, events, error))

        def sink(events: Sequence[Event], error: Exception | None) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody is there to be told
                loop.call_soon_threadsafe(arrive, events, error)

        try:
            ticket = self.worker.submit(request, sink)
        except HalfbyteError as error:
            raise failure_of(error) from error
        self.live += 1
        self._idle.clear()
        return ticket

    def _leave(self, seconds: float) -> None:
        self.live -= 1
        self._usual_s = MEMORY * self._usual_s + (1 - MEMORY) * seconds
        if not self.live:
            self._idle.set()

    async def _next(self, news: asyncio.Queue[News], deadline: float) -> News:
        if not news.empty():
            return news.get_nowait()
        try:
            async with asyncio.timeout(deadline - monotonic()):
                return await news.get()
        except TimeoutError:
            raise Failure(
                503, f"the request took more than {self._request_s:.0f} seconds", "timeout"
            ) from None
