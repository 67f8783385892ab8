"""The engine's thread: what many threads ask for, each gets as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest
from fake_decoder import FakeDecoder
from test_engine_batching import all_free, naive, result

from halfbyte.engine import Completion, Engine, Event, Worker
from halfbyte.errors import InvalidInputError
from halfbyte.specs import Request

WAIT_S = 30.0


class Sink:
    """Collects the events of one request."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        self.began = threading.Event()

    def __call__(self, events: Sequence[Event], error: Exception | None) -> None:
        self.events += events
        self.error = error
        self.began.set()
        if events[-1].completion is not None:
            self.ended.set()

    @property
    def completion(self) -> Completion:
        assert self.ended.wait(WAIT_S)
        found = self.events[-1].completion
        assert found is not None
        return found


class Slow(FakeDecoder):
    """A step takes a moment, so that others can come in between."""

    def outputs(self, chunks, cache):
        time.sleep(0.002)
        return super().outputs(chunks, cache)


@pytest.fixture
def engine():
    return Engine(Slow(), context=3000, max_sequences=3, prefill_chunk=16, keeps=True)


@pytest.fixture
def worker(engine):
    worker = Worker(engine)
    yield worker
    worker.close()
    engine.forget()
    assert all_free(engine)


def test_many_threads_get_their_own_tokens(worker):
    requests = [Request(prompt_ids=(n, 2, 3), max_tokens=12) for n in range(9)]
    sinks = [Sink() for _ in requests]
    threads = [
        threading.Thread(target=worker.submit, args=pair)
        for pair in zip(requests, sinks, strict=True)
    ]
    for thread in threads:
        thread.start()
    found = [result(sink.completion) for sink in sinks]
    assert found == [naive(request, 3000) for request in requests]


def test_what_is_cancelled_ends_before_the_next_step(worker, engine):
    sink, other = Sink(), Sink()
    ticket = worker.submit(Request(prompt_ids=(1, 2), max_tokens=2000), sink)
    worker.submit(Request(prompt_ids=(5,), max_tokens=20), other)
    assert sink.began.wait(WAIT_S)
    worker.cancel(ticket)
    worker.cancel(ticket)
    assert sink.completion.finish_reason == "abort" and sink.error is None
    assert result(other.completion) == naive(Request(prompt_ids=(5,), max_tokens=20), 3000)
    worker.cancel(ticket)


def test_what_waits_can_be_cancelled(worker):
    sinks = [Sink() for _ in range(4)]
    tickets = [worker.submit(Request(prompt_ids=(1,)), sink) for sink in sinks]
    worker.cancel(tickets[3])
    assert sinks[3].completion.token_ids == ()
    for ticket in tickets:
        worker.cancel(ticket)
    assert {sink.completion.finish_reason for sink in sinks} == {"abort"}


def test_what_can_never_run_is_refused_where_it_is_asked_for(worker):
    with pytest.raises(InvalidInputError, match="context holds 3000"):
        worker.submit(Request(prompt_ids=(1,) * 3001), Sink())


class Failing(FakeDecoder):
    def outputs(self, chunks, cache):
        if any(13 in chunk.token_ids for chunk in chunks):
            raise RuntimeError("a broken step")
        return super().outputs(chunks, cache)


def test_a_step_that_fails_ends_its_requests_and_the_thread_goes_on():
    engine = Engine(Failing(), context=100)
    worker = Worker(engine)
    bad, good = Sink(), Sink()
    stops = frozenset({13})
    worker.submit(Request(prompt_ids=(13,)), bad)
    assert bad.completion.finish_reason == "abort" and "broken" in str(bad.error)
    request = Request(prompt_ids=(1,), max_tokens=5, stop_ids=stops)
    worker.submit(request, good)
    assert result(good.completion) == naive(request, 100)
    assert worker.stuck_s < WAIT_S
    worker.close()
    assert worker.stuck_s == float("inf")


def test_close_ends_everything(engine):
    worker = Worker(engine)
    sinks = [Sink() for _ in range(5)]
    for sink in sinks:
        worker.submit(Request(prompt_ids=(1,)), sink)
    assert sinks[0].began.wait(WAIT_S)
    worker.close()
    assert all(sink.completion.finish_reason == "abort" for sink in sinks)


def test_what_is_called_for_happens_between_two_steps(worker):
    seen: list[bool] = []
    called = threading.Event()
    worker.submit(Request(prompt_ids=(1,), max_tokens=50), Sink())
    worker.call(lambda engine: (engine.check_integrity(), seen.append(engine.busy), called.set()))
    assert called.wait(WAIT_S) and seen == [True]
