"""What is kept of ended sequences: it saves rows, changes no token, and all of it comes back.

The decoder of these tests keeps ids where a real one keeps keys, and fails on a missing one.
"""

from __future__ import annotations

import pytest
from fake_decoder import VOCAB, WINDOW, FakeDecoder
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_batching import all_free, drain, naive, result

from halfbyte.engine import Engine
from halfbyte.engine.prefix import Kept, PrefixCache
from halfbyte.models.cache import PAGE_LEN
from halfbyte.specs import Request, SamplingParams, common

CHUNK = 32


def engine(decoder: FakeDecoder | None = None, **options) -> Engine:
    options = {"context": 2000, "prefill_chunk": CHUNK, "keeps": True, "spare": 1, **options}
    return Engine(decoder or FakeDecoder(), **options)


def ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((seed + 7 * index + index * index // 3) % VOCAB for index in range(count))


def ask(prompt: tuple[int, ...], tokens: int = 4, **more) -> Request:
    return Request(prompt_ids=prompt, max_tokens=tokens, **more)


beginnings = st.sampled_from([ids(200), ids(200, 1), ids(130)])
requests = st.builds(
    lambda beginning, cut, tail, tokens, adapter: Request(
        prompt_ids=(*beginning[:cut], *tail),
        max_tokens=tokens,
        sampling=SamplingParams(seed=1),
        adapter=adapter,
    ),
    beginnings,
    st.sampled_from([1, 63, 64, 65, 128, 129, 200]),
    st.lists(st.integers(0, VOCAB - 1), max_size=40),
    st.sampled_from([1, 3, 90]),
    st.sampled_from([None, "poet"]),
)


@settings(max_examples=60, deadline=None)
@given(
    moves=st.lists(st.one_of(requests, requests, st.just("step"), st.integers(0, 9)), max_size=40),
    pages=st.sampled_from([6, 9, 40]),
    running=st.integers(1, 4),
    spare=st.integers(0, 2),
)
def test_whatever_is_kept_the_tokens_are_those_of_the_naive_loop(moves, pages, running, spare):
    decoder = FakeDecoder()
    decoder.adapters = ("poet",)
    it = engine(decoder, pages=pages, max_sequences=running, spare=spare, context=350)
    added: dict[int, Request] = {}
    events = []
    for move in moves:
        if isinstance(move, Request):
            added[it.add(move)] = move
        elif isinstance(move, int):
            it.abort(move)
        else:
            events += it.step()
        it.check_integrity()
    events += drain(it)
    ends = {event.sequence: event.completion for event in events if event.completion}
    assert ends.keys() == added.keys()
    for number, request in added.items():
        expected, reason = naive(request, 350)
        tokens = ends[number].token_ids
        assert tokens == expected[: len(tokens)]
        assert ends[number].finish_reason in (reason, "abort")
    it.check_integrity()
    it.forget()
    assert all_free(it)


def test_a_conversation_goes_on_where_it_stopped():
    decoder = FakeDecoder()
    it = engine(decoder, spare=0)
    first = ids(300)
    (one,) = it.generate([ask(first, 20)])
    assert one.cached_tokens == 0
    before = len(decoder.forwards)
    further = (*first, *one.token_ids, 3, 4, 5)
    (two,) = it.generate([ask(further, 4)])
    # All but the last token of the answer, which was chosen and never computed.
    assert two.cached_tokens == 300 + 19
    assert sum(decoder.forwards[before]) == len(further) - two.cached_tokens
    assert result(two) == naive(ask(further, 4), 2000)


@pytest.mark.parametrize(
    ("answer", "cached"),
    [(30, 299), (80, 256)],  # taken over as it is; shared, in whole pages
)
def test_the_same_prompt_again_is_not_computed_again(answer, cached):
    it = engine()
    (one,) = it.generate([ask(ids(300), answer)])
    (two,) = it.generate([ask(ids(300), answer)])
    assert two.cached_tokens == cached
    assert one.token_ids == two.token_ids


def test_a_long_answer_does_not_cost_the_prompt():
    """The ring has moved on by far more than it can give back; a copy was made in time."""
    it = engine()
    prompt = ids(300)
    it.generate([ask(prompt, 500)])
    (two,) = it.generate([ask((*prompt, 1, 2), 5)])
    assert two.cached_tokens == 299 // PAGE_LEN * PAGE_LEN


def test_a_common_beginning_is_known_the_second_time_it_is_met():
    """Questions behind one long system message, each far longer than a ring reaches back."""
    it = engine(spare=3)
    system = ids(640)
    asks = [ask((*system, *ids(400, seed)), 2) for seed in (5, 6, 7)]
    assert [it.generate([one])[0].cached_tokens for one in asks] == [0, 0, 640]


def test_a_fan_computes_its_prompt_once():
    decoder = FakeDecoder()
    it = engine(decoder, max_sequences=4)
    fan = [ask(ids(400), 8, sequence=index) for index in range(4)]
    found = it.generate(fan)
    assert [result(one) for one in found] == [naive(one, 2000) for one in fan]
    assert [one.cached_tokens for one in found] == [0, 384, 384, 384]
    assert sum(map(sum, decoder.forwards)) < 400 + 4 * 8 + 3 * PAGE_LEN


def test_a_title_does_not_push_out_the_conversation():
    it = engine(pages=24, spare=1)
    conversation = ids(900)
    it.generate([ask(conversation, 4)])
    for seed in range(1, 6):
        it.generate([ask(ids(150, seed), 4)])
    (again,) = it.generate([ask((*conversation, 9), 4)])
    assert again.cached_tokens == 900


def test_what_is_never_used_again_goes_in_the_end():
    it = engine(spare=1, max_sequences=1)
    it.generate([ask(ids(900), 4)])
    for seed in range(1, 12):
        it.generate([ask(ids(300, seed), 4)])
    (again,) = it.generate([ask(ids(900), 4)])
    assert again.cached_tokens == 0


def test_another_adapter_has_other_keys():
    decoder = FakeDecoder()
    decoder.adapters = ("poet",)
    it = engine(decoder)
    it.generate([ask(ids(300))])
    (other,) = it.generate([ask(ids(300), adapter="poet")])
    assert other.cached_tokens == 0


def test_nothing_is_kept_unless_that_is_asked_for():
    it = engine(keeps=False)
    it.generate([ask(ids(300))])
    assert all_free(it)


def test_clients_take_turns():
    it = engine(max_sequences=2)
    eager = [it.add(ask(ids(3, n), 3, client="eager")) for n in range(6)]
    late = it.add(ask(ids(3, 9), 3, client="late"))
    ended = [event.sequence for event in drain(it) if event.completion]
    assert ended.index(late) <= 2
    assert [number for number in ended if number != late] == eager


class Short(FakeDecoder):
    """Has not enough memory for a step of more than so many rows."""

    most = 20

    def outputs(self, chunks, cache):
        if sum(len(chunk.token_ids) for chunk in chunks) > self.most:
            for chunk in chunks:
                self._store(chunk, cache)
            raise MemoryError
        return super().outputs(chunks, cache)


def test_a_step_without_memory_ends_one_request():
    it = engine(Short(), max_sequences=2)
    small, large = ask((1, 2, 3), 9), ask(ids(100), 9)
    done = it.generate([small, large])
    assert result(done[0]) == naive(small, 2000)
    assert result(done[1]) == ((), "memory")
    it.forget()
    assert all_free(it)


@pytest.mark.parametrize("written", [0, 5, WINDOW + CHUNK, 200])
def test_a_ring_reaches_back_by_its_slack(written):
    prefix = PrefixCache(ring_len=WINDOW + CHUNK, slack=CHUNK)
    for length in range(written + 1):
        # The window before `length` lies in the last `ring_len` positions written.
        seen = max(0, length - WINDOW) >= written - (WINDOW + CHUNK)
        assert prefix.reaches(written, length) <= seen
    assert PrefixCache(ring_len=None, slack=1).reaches(10**6, 3)


def test_worth_ages():
    prefix = PrefixCache(ring_len=None, slack=1)
    kept = [Kept(ids(count), None, [], None, count) for count in (100, 10, 20, 30)]
    for it in kept:
        prefix.add(it)
    assert [prefix.evict() for _ in range(2)] == [kept[1], kept[2]]
    prefix.use(kept[3])  # 20 + 30
    newer = Kept(ids(90), None, [], None, 90)
    prefix.add(newer)  # 20 + 90
    assert [prefix.evict() for _ in range(3)] == [kept[3], kept[0], newer]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_beginnings(one, other):
    expected = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    assert common(one, other) == expected
