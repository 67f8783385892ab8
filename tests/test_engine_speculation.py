"""Speculation never lies: with any drafter the tokens are those of the naive loop, in any batch,
and everything a sequence held comes back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from drafters import FunctionDrafter, at_random, right, wrong
from fake_decoder import VOCAB, FakeDecoder
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_engine_batching import Odd, all_free, drain, naive, requests, result

from halfbyte.engine import Drafting, Engine, LookupDrafter, SyntheticVerdict, verify
from halfbyte.engine.lookup import CANDIDATES, KEY, LONGEST, Index
from halfbyte.engine.speculate import Tally
from halfbyte.errors import InvalidInputError
from halfbyte.specs import Request, SamplingParams

DRAFTERS = {
    "right": lambda: FunctionDrafter(right),
    "wrong": lambda: FunctionDrafter(wrong),
    "random": lambda: FunctionDrafter(at_random(VOCAB)),
    "often right": lambda: FunctionDrafter(at_random(VOCAB, chance=0.7)),
    "lookup": LookupDrafter,
}
tokens = st.integers(0, 9)


@given(drafts=st.lists(tokens, max_size=8), truth=st.lists(tokens, min_size=9, max_size=9))
def test_a_verdict_is_a_prefix_of_what_the_target_says(drafts: list[int], truth: list[int]) -> None:
    asked: list[list[int]] = []

    def choose(given: list[int]) -> int:
        asked.append(list(given))
        return truth[len(given)]

    committed = verify(drafts, choose)
    agreed = next((i for i, d in enumerate(drafts) if d != truth[i]), len(drafts))
    assert committed == truth[: agreed + 1]
    # The target is asked once per token, each time about what it said itself.
    assert asked == [truth[:i] for i in range(agreed + 1)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(requests, min_size=1, max_size=5),
    names=st.lists(st.sampled_from(list(DRAFTERS)), min_size=1, max_size=2, unique=True),
    length=st.sampled_from([None, 1, 3, 7]),
    max_sequences=st.integers(1, 3),
    prefill_chunk=st.sampled_from([1, 5, 64]),
)
def test_any_drafter_in_any_batch_changes_no_token(
    batch, names, length, max_sequences, prefill_chunk
) -> None:
    drafters = tuple(DRAFTERS[name]() for name in names)
    engine = Engine(
        FakeDecoder(),
        context=100,
        max_sequences=max_sequences,
        prefill_chunk=prefill_chunk,
        drafting=Drafting(drafters=drafters, length=length),
    )
    completions = engine.generate(batch)
    assert [result(it) for it in completions] == [naive(it, 100) for it in batch]
    assert all_free(engine)


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_device_that_chooses_changes_no_token(name: str) -> None:
    """It chooses where sampling alone decides, and leaves the rest to the host."""
    asked = [
        Request(prompt_ids=(5, 6), max_tokens=30, sampling=SamplingParams(seed=1, top_k=5)),
        Request(prompt_ids=(5, 7), max_tokens=30, guide=Odd()),
        Request(prompt_ids=(5, 8), max_tokens=9, top_logprobs=2),
    ]
    device = FakeDecoder(chooses=True)
    drafting = Drafting(drafters=(DRAFTERS[name](),), length=2)
    host = Engine(FakeDecoder(), context=60).generate(asked)
    chosen = Engine(device, context=60, drafting=drafting).generate(asked)
    assert [result(it) for it in chosen] == [result(it) for it in host]
    assert 0 < device.chosen < sum(map(sum, device.forwards))


@settings(max_examples=40, deadline=None)
@given(
    moves=st.lists(
        st.one_of(requests, st.just("step"), st.just("step"), st.integers(0, 9)), max_size=30
    ),
    name=st.sampled_from(list(DRAFTERS)),
)
def test_random_arrivals_and_aborts_keep_integrity(moves, name) -> None:
    engine = Engine(
        FakeDecoder(),
        context=100,
        max_sequences=3,
        prefill_chunk=32,
        pages=3,
        drafting=Drafting(drafters=(DRAFTERS[name](),), length=4),
    )
    added: dict[int, Request] = {}
    aborted: set[int] = set()
    events = []
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
    ends = {event.sequence: event.completion for event in events if event.completion}
    for number, request in added.items():
        said, reason = result(ends[number])
        expected = naive(request, 100)
        if number in aborted and reason == "abort":
            assert said == expected[0][: len(said)]
        else:
            assert (said, reason) == expected


def test_a_right_drafter_needs_one_forward_for_all_its_drafts() -> None:
    decoder = FakeDecoder()
    drafting = Drafting(drafters=(FunctionDrafter(right),), length=4)
    engine = Engine(decoder, context=100, drafting=drafting)
    request = Request(prompt_ids=(1, 2, 3), max_tokens=21)
    (done,) = engine.generate([request])
    assert result(done) == naive(request, 100)
    assert decoder.forwards == [[3], [5], [5], [5], [5]]
    assert done.draft is not None
    assert (done.draft.rounds, done.draft.proposed, done.draft.accepted) == (4, 16, 16)
    assert done.draft.accepted_by_position == (4, 4, 4, 4)
    assert done.draft.tokens_per_round == 5


class TellsPlaces(FakeDecoder):
    """The state of a row is its position."""

    def outputs(self, chunks, cache):
        logits, _ = super().outputs(chunks, cache)
        places = [
            float(place)
            for chunk in chunks
            for place in range(chunk.slot.length)[-len(chunk.token_ids) :]
            if chunk.wanted == "all" or (chunk.wanted, place + 1) == ("last", chunk.slot.length)
        ]
        return logits, np.array(places, dtype=np.float32)[:, None]


@pytest.mark.parametrize("following", [right, wrong, at_random(VOCAB, chance=0.7)])
def test_a_drafter_goes_on_from_the_state_that_chose_the_last_id(following) -> None:
    seen: list[int] = []

    def noting(sequence, drafts) -> int:
        assert sequence.state is not None and sequence.state[0] == len(sequence.ids) - 2
        seen.append(len(sequence.ids))
        return following(sequence, drafts)

    drafting = Drafting(drafters=(FunctionDrafter(noting),), length=3)
    engine = Engine(TellsPlaces(), context=100, max_sequences=2, prefill_chunk=4, drafting=drafting)
    engine.generate([Request(prompt_ids=(1, 2, 3) * 3, max_tokens=20, sequence=n) for n in (0, 1)])
    assert len(seen) > 10


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_round_that_is_interrupted_gives_everything_back(at: int) -> None:
    drafting = Drafting(drafters=(FunctionDrafter(wrong),), length=3)
    engine = Engine(FakeDecoder(interrupt_at=at), context=100, max_sequences=2, drafting=drafting)
    request = Request(prompt_ids=(1, 2, 3), max_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request, request])
    assert all_free(engine)
    assert result(engine.generate([request])[0]) == naive(request, 100)


def test_a_drafter_that_fails_ends_the_sequences_of_its_round_and_no_more() -> None:
    def broken(sequence, drafts):
        raise KeyboardInterrupt

    drafter = FunctionDrafter(broken)
    engine = Engine(FakeDecoder(), context=100, drafting=Drafting(drafters=(drafter,), length=2))
    request = Request(prompt_ids=(1, 2, 3), max_tokens=12)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([request])
    assert all_free(engine)
    drafter.following = right
    assert result(engine.generate([request])[0]) == naive(request, 100)


def test_what_is_outside_of_the_vocabulary_is_refused() -> None:
    drafter = FunctionDrafter(lambda sequence, drafts: VOCAB)
    engine = Engine(FakeDecoder(), context=100, drafting=Drafting(drafters=(drafter,), length=2))
    with pytest.raises(InvalidInputError, match=r"'function' proposes id 50; .* \[0, 50\)"):
        engine.generate([Request(prompt_ids=(1, 2, 3), max_tokens=12)])
    assert all_free(engine)


def test_more_drafts_than_the_rings_can_take_back_are_refused() -> None:
    drafters = (FunctionDrafter(right),)
    Engine(FakeDecoder(), context=100, drafting=Drafting(drafters=drafters, length=99))
    with pytest.raises(
        InvalidInputError, match="101 rows in a round of drafts; the rings have 100"
    ):
        Engine(FakeDecoder(), context=100, drafting=Drafting(drafters=drafters, length=100))
    with pytest.raises(InvalidInputError, match="0 drafts a round"):
        Drafting(drafters=drafters, length=0)


def test_the_marginal_of_a_token_is_the_targets() -> None:
    """Chi-square of the third token over many seeds, drafted, against the target's own tree."""
    sampling = SamplingParams(temperature=1.0, top_k=3)
    drafting = Drafting(drafters=(FunctionDrafter(at_random(VOCAB, chance=0.5)),), length=3)
    engine = Engine(FakeDecoder(), context=100, max_sequences=8, drafting=drafting)
    request = Request(prompt_ids=(5, 6, 7), max_tokens=2)
    seeds = 3000
    batch = [replace(request, sampling=replace(sampling, seed=seed)) for seed in range(seeds)]
    counts = Counter(done.token_ids for done in engine.generate(batch))
    expected = tree((5, 6, 7), 2)
    assert set(counts) <= set(expected)
    square = sum((counts[ids] - seeds * p) ** 2 / (seeds * p) for ids, p in expected.items())
    assert square < 26.1  # 8 degrees of freedom, 0.1 %


def tree(prompt: tuple[int, ...], depth: int) -> dict[tuple[int, ...], float]:
    """The probability of every continuation of that length, top-3 at temperature 1."""
    from fake_decoder import logits_after

    if depth == 0:
        return {(): 1.0}
    row = logits_after(prompt).astype(np.float64)
    best = np.argsort(-row)[:3]
    weights = np.exp(row[best] - row[best].max())
    found: dict[tuple[int, ...], float] = {}
    for token, p in zip(best.tolist(), weights / weights.sum(), strict=True):
        for rest, q in tree((*prompt, token), depth - 1).items():
            found[(token, *rest)] = float(p * q)
    return found


def test_synthetic_rates_are_unconditional() -> None:
    rates = (0.8, 0.64, 0.5, 0.1)
    verdict = SyntheticVerdict(rates, seed=1)
    rounds = [verdict([1, 2, 3, 4], lambda given: 9) for _ in range(4000)]
    assert all(said == [*[1, 2, 3, 4][: len(said) - 1], 9] for said in rounds)
    for place, rate in enumerate(rates):
        share = sum(len(said) > place + 1 for said in rounds) / len(rounds)
        assert abs(share - rate) < 0.03
    for bad in ((), (0.5, 0.6), (1.2,), (float("nan"),)):
        with pytest.raises(InvalidInputError, match="acceptance rates"):
            SyntheticVerdict(bad)


def test_a_synthetic_verdict_drives_the_loop() -> None:
    drafting = Drafting(
        drafters=(FunctionDrafter(wrong),), length=2, verdict=SyntheticVerdict((1.0, 0.0))
    )
    engine = Engine(FakeDecoder(), context=100, drafting=drafting)
    (done,) = engine.generate([Request(prompt_ids=(1,), max_tokens=21)])
    assert done.draft is not None and done.draft.tokens_per_round == 2
    assert all_free(engine)


def longest_match(ids: list[int]) -> int:
    """The longest end of `ids` that stands earlier, too, by brute force."""
    return max(
        (
            length
            for length in range(KEY, min(LONGEST, len(ids) - 1) + 1)
            for start in range(len(ids) - length)
            if ids[start : start + length] == ids[-length:]
        ),
        default=0,
    )


@settings(max_examples=150)
@given(ids=st.lists(st.integers(0, 1), max_size=CANDIDATES + KEY), grow=st.integers(1, 5))
@example(ids=[8, 1, 2, 3, 5, 1, 2, 3, 8, 1, 2, 3], grow=2)  # the longest is not the nearest
def test_a_lookup_finds_the_longest_match_however_the_sequence_grew(ids, grow) -> None:
    index = Index()
    for end in [*range(0, len(ids), grow), len(ids)]:
        match = index.find(ids[:end])
    assert (0 if match is None else match.length) == longest_match(ids)
    if match is not None:
        before = ids[: len(ids) - match.distance]
        assert before[-match.length :] == ids[-match.length :]
        assert match.continued(ids, 5) == (ids[len(before) :] * 5)[:5]


def test_a_periodic_text_is_continued_as_it_is() -> None:
    match = Index().find([1, 2, 3, 4] * 3)
    assert match is not None and match.continued([1, 2, 3, 4] * 3, 6) == [1, 2, 3, 4, 1, 2]


def test_a_tally_counts_rounds_by_kind() -> None:
    tally = Tally()
    tally.count(3, 2, 1.0, 4.0)
    tally.count(1, 1, 1.0, 4.0)
    tally.count(0, 0, 0.5, 2.0)
    tally.plain_step_s = 2.0
    stats = tally.stats()
    assert stats.accepted_by_position == (2, 1, 0)
    assert (stats.proposed, stats.accepted, stats.plain_rounds) == (4, 3, 1)
    assert stats.tokens_per_round == 2.5
    assert stats.speedup == 6 * 2.0 / 12.5
    assert Tally().stats().tokens_per_round is None and Tally().stats().speedup is None
