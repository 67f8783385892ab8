"""The engine over a decoder that hashes its cache: whatever runs beside it, a request gets the
tokens of the naive loop, and everything it held comes back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fake_decoder import VOCAB, FakeDecoder, logits_after
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine import Completion, Engine, Event, sample
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.models.cache import PAGE_LEN
from halfbyte.specs import Request, SamplingParams


def naive(request: Request, context: int) -> tuple[tuple[int, ...], str]:
    """The loop without cache or batch: all ids so far, one row, one token."""
    ids = list(request.prompt_ids)
    prompt = len(ids)
    while len(ids) <= context and len(ids) - prompt != request.max_tokens:
        token = sample(
            logits_after(ids),
            request.sampling,
            sequence=request.sequence,
            position=len(ids),
            history=ids,
        )
        if token in request.stop_ids:
            return tuple(ids[prompt:]), "stop"
        ids.append(token)
    return tuple(ids[prompt:]), "length"


def result(completion: Completion | None) -> tuple[tuple[int, ...], str]:
    assert completion is not None
    return completion.token_ids, completion.finish_reason


def drain(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def all_free(engine: Engine) -> bool:
    engine.check_integrity()
    scheduler = engine._scheduler
    return (
        scheduler.pages.available == scheduler.pages.num_pages
        and scheduler.rings.available == scheduler.rings.num_pages
        and not engine.busy
    )


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    top_k=st.sampled_from([0, 8]),
    top_p=st.sampled_from([0.9, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 3),
)
requests = st.builds(
    Request,
    prompt_ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=100).map(tuple),
    sampling=samplings,
    max_tokens=st.sampled_from([None, 1, 2, 30]),
    stop_ids=st.sampled_from([frozenset({7, 11, 13, 17}), frozenset({20})]),
    sequence=st.integers(0, 2),
    prompt_logprobs=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(requests, min_size=1, max_size=6),
    max_sequences=st.integers(1, 4),
    prefill_chunk=st.sampled_from([1, 5, 16, 64, 512]),
)
def test_every_batch_gives_each_request_its_own_tokens(batch, max_sequences, prefill_chunk):
    engine = Engine(
        FakeDecoder(), context=100, max_sequences=max_sequences, prefill_chunk=prefill_chunk
    )
    completions = engine.generate(batch)
    assert [result(it) for it in completions] == [naive(it, 100) for it in batch]
    assert all_free(engine)


@settings(max_examples=40, deadline=None)
@given(
    moves=st.lists(
        st.one_of(requests, st.just("step"), st.just("step"), st.integers(0, 9)), max_size=40
    ),
    pages=st.sampled_from([2, 3, 8]),
)
def test_random_arrivals_and_aborts_keep_integrity(moves, pages):
    engine = Engine(FakeDecoder(), context=100, max_sequences=3, prefill_chunk=32, pages=pages)
    added: dict[int, Request] = {}
    aborted: set[int] = set()
    events: list[Event] = []
    for move in moves:
        if isinstance(move, Request):
            added[engine.add(move)] = move
        elif isinstance(move, int):
            engine.abort(move)
            aborted.add(move)
        else:
            events += engine.step()
        engine.check_integrity()
    events += drain(engine)
    assert all_free(engine)
    for number, request in added.items():
        mine = [event for event in events if event.sequence == number]
        tokens = tuple(event.token_id for event in mine if event.token_id is not None)
        assert [event for event in mine if event.completion] == mine[-1:]
        assert result(mine[-1].completion) == (tokens, mine[-1].finish_reason)
        expected, reason = naive(request, 100)
        assert tokens == expected[: len(tokens)]
        if mine[-1].finish_reason == "abort":
            assert number in aborted
        else:
            assert (tokens, mine[-1].finish_reason) == (expected, reason)


@pytest.mark.parametrize("prompt_len", [1, PAGE_LEN - 1, PAGE_LEN, PAGE_LEN + 1, 129, 130])
@pytest.mark.parametrize("max_tokens", [1, 2, None])
def test_extremes_of_length(prompt_len, max_tokens):
    """The last position of the context still gives its token."""
    request = Request(prompt_ids=(3,) * prompt_len, max_tokens=max_tokens)
    decoder = FakeDecoder()
    engine = Engine(decoder, context=130, prefill_chunk=64)
    (completion,) = engine.generate([request])
    room = 130 - prompt_len + 1
    assert len(completion.token_ids) == min(max_tokens or room, room)
    assert result(completion) == naive(request, 130)
    assert sum(map(sum, decoder.forwards)) == prompt_len + len(completion.token_ids) - 1
    assert all_free(engine)


def test_stop_ids_end_a_sequence_and_are_not_part_of_it():
    free = Request(prompt_ids=(1, 2), max_tokens=20, sampling=SamplingParams(temperature=0))
    tokens, _ = naive(free, 100)
    stop = tokens[9]
    request = replace(free, stop_ids=frozenset({stop}))
    events = list(Engine(FakeDecoder(), context=100).stream(request))
    kept = tokens[: tokens.index(stop)]
    assert tuple(event.token_id for event in events) == (*kept, None)
    assert [event.finish_reason for event in events] == [None] * len(kept) + ["stop"]
    completion = events[-1].completion
    assert completion is not None and completion.decode_tokens == len(kept)


def test_the_last_token_and_the_end_are_one_event():
    events = list(Engine(FakeDecoder(), context=100).stream(Request(prompt_ids=(1,), max_tokens=2)))
    assert [(event.token_id is None, event.finish_reason) for event in events] == [
        (False, None),
        (False, "length"),
    ]


def test_completions_of_one_prompt_differ_by_their_sequence():
    request = Request(prompt_ids=(5, 6), max_tokens=30, sampling=SamplingParams(seed=1))
    fan = [replace(request, sequence=index) for index in (0, 1, 2)]
    completions = Engine(FakeDecoder(), context=100, max_sequences=3).generate(fan)
    assert len({it.token_ids for it in completions}) == 3


def test_streams_may_be_interleaved_with_each_other_and_with_steps():
    prompts = [Request(prompt_ids=(n, 1), max_tokens=12) for n in range(4)]
    engine = Engine(FakeDecoder(), context=50, max_sequences=2)
    number = engine.add(prompts[3])
    streams = [engine.stream(it) for it in prompts[:3]]
    tokens: list[list[int | None]] = [[], [], []]
    for _ in range(12):
        for into, stream in zip(tokens, streams, strict=True):
            into.append(next(stream).token_id)
    assert [tuple(it) for it in tokens] == [naive(it, 50)[0] for it in prompts[:3]]
    assert all(next(stream, None) is None for stream in streams)
    events = drain(engine)
    assert {event.sequence for event in events} == {number}
    assert result(events[-1].completion) == naive(prompts[3], 50)
    assert all_free(engine)


def test_a_stream_that_is_closed_gives_everything_back():
    engine = Engine(FakeDecoder(), context=100)
    stream = engine.stream(Request(prompt_ids=(1, 2, 3)))
    next(stream)
    assert engine.busy
    stream.close()
    assert all_free(engine)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_interrupted_step_leaves_the_engine_usable(at):
    engine = Engine(FakeDecoder(interrupt_at=at), context=100, max_sequences=2, prefill_chunk=8)
    request = Request(prompt_ids=(1, 2, 3) * 5, max_tokens=9)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request, request, request])
    assert all_free(engine)
    assert result(engine.generate([request])[0]) == naive(request, 100)


def test_an_interrupted_step_ends_who_was_in_it_and_nobody_else():
    engine = Engine(FakeDecoder(interrupt_at=1), context=100)
    request = Request(prompt_ids=(1, 2, 3), max_tokens=9)
    first, second = engine.add(request), engine.add(request)
    engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    ends = {e.sequence: e.completion for e in drain(engine) if e.completion}
    assert result(ends[first]) == (naive(request, 100)[0][:1], "abort")
    assert result(ends[second]) == naive(request, 100)


def test_abort_frees_at_once_and_only_once():
    engine = Engine(FakeDecoder(), context=100)
    running, waiting = (engine.add(Request(prompt_ids=(1,))) for _ in range(2))
    engine.step()
    for number in (running, waiting, running, 77):
        engine.abort(number)
    ends = [(event.sequence, event.finish_reason) for event in engine.step()]
    assert ends == [(running, "abort"), (waiting, "abort")]
    assert all_free(engine)
    assert engine.step() == []


def test_close_aborts_everything():
    engine = Engine(FakeDecoder(), context=100)
    engine.add(Request(prompt_ids=(1,)))
    engine.close()
    engine.check_integrity()
    with pytest.raises(AssertionError, match="closed"):
        engine.step()


def test_times_are_charged_to_the_phase_of_the_sequence():
    engine = Engine(FakeDecoder(), context=100, prefill_chunk=4)
    one, many = engine.generate(
        [Request(prompt_ids=(1,) * 9, max_tokens=1), Request(prompt_ids=(1,), max_tokens=5)]
    )
    assert one.prefill_s > 0 and one.decode_s == 0 and one.decode_tokens == 0
    assert many.prefill_s > 0 and many.decode_s > 0 and many.decode_tokens == 4
    assert one.prompt_tokens == 9


def test_what_cannot_run_is_refused_and_nothing_is_left_behind():
    engine = Engine(FakeDecoder(context=100), context=90, pages=1)
    fine = Request(prompt_ids=(1,), max_tokens=3)
    for request, error, message in (
        (Request(prompt_ids=(1,) * 91), InvalidInputError, "91 tokens; the context holds 90"),
        (Request(prompt_ids=(1, VOCAB)), InvalidInputError, r"id 50; the vocabulary is \[0, 50\)"),
        (Request(prompt_ids=(-1,)), InvalidInputError, "id -1"),
        (
            Request(prompt_ids=(1,), sampling=SamplingParams(suppress=frozenset({99}))),
            InvalidInputError,
            "suppressed ids has id 99",
        ),
        (Request(prompt_ids=(1,), max_tokens=80), DoesNotFitError, "80 positions"),
    ):
        with pytest.raises(error, match=message):
            engine.generate([fine, request])
        assert all_free(engine)


def test_options_outside_their_range_are_refused():
    with pytest.raises(InvalidInputError, match="beyond the model's 100"):
        Engine(FakeDecoder(context=100), context=101)
    for options in ({"context": 0}, {"max_sequences": 0}, {"prefill_chunk": 0}):
        with pytest.raises(InvalidInputError, match="at least 1"):
            Engine(FakeDecoder(), **{"context": 10, **options})


class Timed(FakeDecoder):
    """A row takes a hundredth of a second, by its own clock."""

    now = 0.0

    def outputs(self, chunks, cache):
        self.now += 0.01 * sum(len(chunk.token_ids) for chunk in chunks)
        return super().outputs(chunks, cache)


def test_a_long_prompt_keeps_nobody_waiting_for_long():
    """Beside somebody who decodes a chunk takes a quarter of a second, or has 32 rows."""
    decoder = Timed()
    engine = Engine(decoder, context=2000, max_sequences=2, clock=lambda: decoder.now)
    short, long = Request(prompt_ids=(1,) * 100), Request(prompt_ids=(2,) * 900, max_tokens=1)
    engine.add(short)
    engine.step()  # alone, a prompt comes as a whole
    engine.add(long)
    while len(decoder.forwards) < 12:
        engine.step()
    assert decoder.forwards[0] == [100]
    assert decoder.forwards[1:] == [[1, 32]] * 11


def log_probabilities(ids: list[int]) -> np.ndarray:
    row = logits_after(ids).astype(np.float64)
    return row - row.max() - np.log(np.exp(row - row.max()).sum())


def test_probabilities_are_the_models_own():
    plain = Request(prompt_ids=(1, 2), max_tokens=3, sampling=SamplingParams(seed=4))
    asked = replace(plain, top_logprobs=3)
    events = list(Engine(FakeDecoder(), context=50).stream(asked))
    ids = list(plain.prompt_ids)
    for event in events:
        row = logits_after(ids).astype(np.float64)
        expected = log_probabilities(ids)
        found = event.logprobs
        assert found.logprob == pytest.approx(expected[event.token_id], abs=1e-5)
        best = np.argsort(-row, kind="stable")[:3].tolist()
        assert [token for token, _ in found.top] == best
        assert [value for _, value in found.top] == pytest.approx(expected[best], abs=1e-5)
        ids.append(event.token_id)
    quiet = Engine(FakeDecoder(), context=50).stream(plain)
    assert [(e.token_id, e.logprobs) for e in quiet] == [(e.token_id, None) for e in events]


@pytest.mark.parametrize("length", [1, 2, 8, 9, 17, 150])
def test_probabilities_of_a_prompt(length: int):
    """Each id's after those before it, however the prompt is cut and whatever the cache has; an
    answer that is a stop id at once brings them, too."""
    rng = np.random.default_rng(length)
    prompt = tuple(rng.integers(0, VOCAB, length).tolist())
    asked = Request(prompt_ids=prompt, max_tokens=2, top_logprobs=2, prompt_logprobs=True)
    ended = replace(asked, stop_ids=frozenset(range(VOCAB)))
    plain = replace(asked, prompt_logprobs=False)
    engine = Engine(FakeDecoder(), context=200, max_sequences=4, prefill_chunk=64, keeps=True)
    outboxes: list[list[Event]] = [[], [], [], []]
    for request, outbox in zip((plain, asked, ended, asked), outboxes, strict=True):
        engine.add(request, outbox)
    while engine.busy:
        engine.advance()
    silent, *told = outboxes
    assert all(not event.prompt_logprobs for event in silent)
    assert [it.token_id for it in told[0]] == [it.token_id for it in silent]
    for first, *others in told:
        assert not any(event.prompt_logprobs for event in others)
        expected = [log_probabilities([*prompt[:at]]) for at in range(1, length)]
        values = [row[token] for row, token in zip(expected, prompt[1:], strict=True)]
        assert [it.logprob for it in first.prompt_logprobs] == pytest.approx(values, abs=1e-5)
        best = [int(row.argmax()) for row in expected]
        assert [it.top[0][0] for it in first.prompt_logprobs] == best


class Odd:
    """A guide that lets only odd ids come after an even number of tokens."""

    def allowed(self, chosen):
        return bytes([0b10101010]) * 8 if len(chosen) % 2 == 0 else None


def test_a_guide_rules_out_tokens_alone_and_in_a_batch():
    request = Request(prompt_ids=(1, 2), max_tokens=20, guide=Odd())
    (alone,) = Engine(FakeDecoder(), context=50).generate([request])
    assert all(token % 2 for token in alone.token_ids[::2])
    assert not all(token % 2 for token in alone.token_ids[1::2])
    others = [Request(prompt_ids=(n,), max_tokens=9) for n in range(5)]
    beside = Engine(FakeDecoder(), context=50, max_sequences=6).generate([*others, request])
    assert beside[-1].token_ids == alone.token_ids
