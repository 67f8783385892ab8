"""One job from its first event to its last, in whatever form the client reads.

A `Form` knows a wire format; it is told what happens and says what to send. The same run of events
makes a stream of frames or one document.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from time import perf_counter
from typing import Any, Protocol

from halfbyte.engine import Event
from halfbyte.serve.desk import Visit
from halfbyte.serve.failure import Failure, failure_of
from halfbyte.serve.job import Job
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.stream import Delta, Telling, Told

Object = dict[str, Any]


class Form(Protocol):
    """A wire format, for one job. `frames` are bytes of server-sent events."""

    def begin(self) -> Iterable[bytes]:
        """Before anything is told."""
        ...

    def tell(self, index: int, delta: Delta, told: Told) -> Iterable[bytes]:
        """Something of one choice."""
        ...

    def end(self, index: int, told: Told) -> Iterable[bytes]:
        """A choice has ended."""
        ...

    def close(self, told: list[Told]) -> Iterable[bytes]:
        """All have."""
        ...

    def fail(self, failure: Failure) -> Iterable[bytes]:
        """It went wrong in the middle."""
        ...

    def whole(self, told: list[Told]) -> Object:
        """The answer as one document."""
        ...


class Clerk:
    """Follows jobs that a desk has let in. `metrics` are told how each choice went."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def document(self, job: Job, visit: Visit, form: Form) -> Object:
        """Follows a job to its end. Raises `Failure`."""
        tellings = job.tell()
        async with aclosing(self._events(visit, tellings)) as events:
            async for index, event in events:
                for _ in tellings[index].push(event):
                    pass
        return form.whole([it.told for it in tellings])

    async def frames(self, job: Job, visit: Visit, form: Form) -> AsyncGenerator[bytes]:
        """The frames of a job as it runs; a failure in the middle is a frame, too."""
        tellings = job.tell()
        for frame in form.begin():
            yield frame
        try:
            async with aclosing(self._events(visit, tellings)) as events:
                async for index, event in events:
                    telling = tellings[index]
                    if telling.ended:
                        continue
                    for delta in telling.push(event):
                        for frame in form.tell(index, delta, telling.told):
                            yield frame
                    if telling.ended:
                        for frame in form.end(index, telling.told):
                            yield frame
        except Failure as failure:
            for frame in form.fail(failure):
                yield frame
            return
        for frame in form.close([it.told for it in tellings]):
            yield frame

    async def _events(
        self, visit: Visit, tellings: list[Telling]
    ) -> AsyncGenerator[tuple[int, Event]]:
        """Every event with its choice, until all are told. Raises `Failure`."""
        start = perf_counter()
        news = visit.news(lambda index: tellings[index].ended)
        async with aclosing(news):
            async for index, events, error in news:
                telling = tellings[index]
                for event in events:
                    seconds = perf_counter() - start
                    if event.token_id is not None:
                        telling.told.first_s = telling.told.first_s or seconds
                        self._metrics.token()
                    if event.completion is not None:
                        if not telling.ended:
                            _refuse_broken(event, error)
                        telling.told.completion = event.completion
                        self._metrics.answered(telling.told, seconds)
                    yield index, event


def _refuse_broken(event: Event, error: Exception | None) -> None:
    """An end that is none of the model's."""
    if error is not None:
        raise failure_of(error) from error
    if event.finish_reason == "memory":
        raise failure_of(MemoryError())
    if event.finish_reason == "abort":
        raise Failure(503, "the server is shutting down", "shutting_down")


def frame(data: Object, event: str | None = None) -> bytes:
    """One server-sent event: exactly these bytes, for the parsers that read no others."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {text}\n\n".encode()
