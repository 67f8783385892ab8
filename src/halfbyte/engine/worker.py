"""One thread runs the engine; any thread may ask it for something.

The engine has one caller at a time: this is it. Others submit requests and get their events by
callback, in this thread and a step at a time, and cancel them; what was cancelled ends before the
next step. A step that fails ends the requests that were in it, with the error, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, SimpleQueue
from threading import Event as Flag
from threading import Thread
from time import monotonic

from halfbyte.engine.engine import Engine, Usage
from halfbyte.engine.sequence import Event
from halfbyte.specs import Request

Sink = Callable[[Sequence[Event], Exception | None], None]
"""Takes the events of one request that a step brought, and the error if the step failed."""


@dataclass(slots=True)
class _Client:
    """A request under way: its number in the engine, and where its events go."""

    sink: Sink
    number: int
    outbox: list[Event] = field(default_factory=list[Event])


class Worker:
    """Runs an engine until `close`. `usage` is as of the last step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._wishes: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._clients: dict[int, _Client] = {}
        self._tickets = count()
        self._stopping = Flag()
        self._since = monotonic()
        self.usage: Usage = engine.usage
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def stuck_s(self) -> float:
        """How long the step under way has taken; 0 between steps. Infinite if the thread died."""
        if not self._thread.is_alive():
            return float("inf")
        return monotonic() - self._since if self._since else 0.0

    def submit(self, request: Request, sink: Sink) -> int:
        """Queue a request; returns its ticket. Raises what `Engine.check` does, at once."""
        self._engine.check(request)
        ticket = next(self._tickets)
        self._wishes.put(lambda: self._add(ticket, request, sink))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request before the next step; its end is told like any other. It may have ended."""
        self._wishes.put(lambda: self._abort(ticket))

    def call(self, wish: Callable[[Engine], None]) -> None:
        """Do something with the engine between two steps."""
        self._wishes.put(lambda: wish(self._engine))

    def close(self, timeout_s: float | None = None) -> None:
        """End everything and the thread. The engine is left open, and idle."""
        self._stopping.set()
        self._wishes.put(lambda: None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._since = 0.0
            self._fulfil(waits=not self._clients)
            self._since = monotonic()
            error = None
            try:
                self._engine.advance()
            except Exception as failure:  # of the requests that were in it
                error = failure
            self._deliver(error)
        self._fulfil(waits=False)
        for ticket in list(self._clients):
            self._abort(ticket)
        self._deliver(None)

    def _fulfil(self, *, waits: bool) -> None:
        """What was asked for since the last step; `waits` for something, if nothing was."""
        try:
            while True:
                self._wishes.get(block=waits)()
                waits = False
        except Empty:
            pass

    def _add(self, ticket: int, request: Request, sink: Sink) -> None:
        client = _Client(sink, number=-1)
        client.number = self._engine.add(request, client.outbox)
        self._clients[ticket] = client

    def _abort(self, ticket: int) -> None:
        client = self._clients.get(ticket)
        if client is not None:
            self._engine.abort(client.number)

    def _deliver(self, error: Exception | None) -> None:
        self.usage = self._engine.usage
        for ticket, client in list(self._clients.items()):
            if not client.outbox:
                continue
            events = client.outbox.copy()
            client.outbox.clear()
            ended = events[-1].completion
            if ended is not None:
                del self._clients[ticket]
            failed = ended is not None and ended.finish_reason == "abort"
            client.sink(events, error if failed else None)
