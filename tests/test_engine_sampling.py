"""Sampling: the noise by its definition, the filters by a plain twin, the choice by its law."""

from __future__ import annotations

import math
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.engine.noise import HIGHEST, LOWEST, gumbel, philox, uniform
from halfbyte.engine.sampling import NothingLeftError, sample, survivors
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.specs import SamplingParams


def choose(logits, params=None, *, sequence=0, position=0, history=()) -> int:
    row = np.asarray(logits, dtype=np.float32)
    params = params or SamplingParams()
    return sample(row, params, sequence=sequence, position=position, history=history)


# Random123, tests/kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    def arrays(text):
        return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())

    assert [f"{int(word[0]):08x}" for word in philox(arrays(counter), arrays(key))] == words.split()


def test_the_noise_is_what_the_module_says():
    """Seed, sequence, position and id are the words of the third known answer."""
    draws = uniform(
        np.array([0x243F6A88]),
        seed=0x299F31D0_A4093822,
        sequence=0x03707344_13198A2E,
        position=0x85A308D3,
    )
    assert draws[0] == (0xD16CFE + 0.5) / 2**24
    noise = gumbel(np.array([5]), seed=1, sequence=2, position=3)
    (draw,) = uniform(np.array([5]), seed=1, sequence=2, position=3)
    assert noise[0] == pytest.approx(-math.log(-math.log(draw)), rel=1e-14)


def test_the_noise_of_a_token_does_not_depend_on_the_others():
    every = gumbel(np.arange(1000), seed=7, sequence=0, position=9)
    some = np.array([999, 3, 500])
    np.testing.assert_array_equal(gumbel(some, seed=7, sequence=0, position=9), every[some])
    assert every.min() > LOWEST and every.max() < HIGHEST
    for change in ({"seed": 8}, {"sequence": 1}, {"position": 10}, {"seed": 7 + 2**32}):
        other = gumbel(np.arange(1000), **{"seed": 7, "sequence": 0, "position": 9, **change})
        assert (other != every).mean() > 0.99


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8, temperature=2),
        SamplingParams(min_p=0.2, temperature=1.5),
    ],
)
def test_tokens_follow_the_softmax_of_the_survivors(params):
    """Chi-square over 4000 positions; the bound is passed by chance once in ten thousand."""
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32) * 1.5
    ids, weights = survivors(logits, params)
    expected = np.exp(weights) / np.exp(weights).sum() * 4000
    drawn = [choose(logits, params, position=position) for position in range(4000)]
    observed = np.bincount(drawn, minlength=12)
    assert observed.sum() == observed[ids].sum()
    freedom = len(ids) - 1
    # Wilson and Hilferty's approximation of the quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((observed[ids] - expected) ** 2 / expected).sum() < bound


def naive_survivors(logits, params) -> list[int]:
    """Top-k, top-p and min-p as their definitions read, with full sorts."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: params.top_k or None]
    best = float(logits[order[0]])
    mass = {token: math.exp((float(logits[token]) - best) / params.temperature) for token in order}
    whole, before, kept = sum(mass.values()), 0.0, []
    for token in order:
        inside = params.top_p == 1 or before < params.top_p * whole
        if inside and mass[token] >= params.min_p:
            kept.append(token)
        before += mass[token]
    return sorted(kept)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 63, 64, 65, 130, 1000]),
    grid=st.sampled_from([0.0, 1.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 64, 999, 5000]),
    top_p=st.sampled_from([1.0, 0.9503, 0.5011, 0.0101, 1e-9]),
    min_p=st.sampled_from([0.0, 0.0503, 0.7001, 1.0]),
)
def test_filters_equal_their_definitions(seed, vocab, grid, temperature, top_k, top_p, min_p):
    """`grid` rounds the logits, so that there are many ties."""
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * 2
    logits = np.round(logits) if grid else logits
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = survivors(logits, params)
    assert ids.tolist() == naive_survivors(logits, params)
    assert weights.max() == 0


def test_leaving_out_what_cannot_win_changes_no_token():
    """Against noise for the whole vocabulary, with logits far beyond the span of the noise."""
    logits = np.random.default_rng(0).normal(size=3000).astype(np.float32) * 12
    weights = logits.astype(np.float64)
    for position in range(300):
        noise = gumbel(np.arange(3000), seed=0, sequence=0, position=position)
        assert choose(logits, position=position) == int(np.argmax(weights + noise))


def test_greedy_takes_the_lowest_id_of_the_best():
    greedy = SamplingParams(temperature=0)
    assert choose([1, 3, 3, 2], greedy) == 1
    assert choose([1, 3, 3, 2], SamplingParams(temperature=0, suppress=frozenset({1}))) == 2
    assert choose([-np.inf, -5, -np.inf], greedy) == 1
    assert choose([0, 1, 2], SamplingParams(temperature=1e-300)) == 2


def test_repetition_penalty_comes_first_and_counts_each_id_once():
    params = SamplingParams(temperature=0, repetition_penalty=2)
    assert choose([3, 4, 1], params, history=[1, 1, 1]) == 0
    assert choose([3, 7, 1], params, history=[1, 1, 1]) == 1
    assert choose([-3, -2, -9], params, history=[1]) == 0
    logits = np.array([3, 4, 1], dtype=np.float32)
    sample(logits, params, sequence=0, position=1, history=[1])
    assert logits.tolist() == [3, 4, 1]


def test_suppressed_ids_are_never_chosen():
    params = SamplingParams(suppress=frozenset({0, 2}), top_k=3)
    assert {choose([9, 1, 9, 1], params, position=at) for at in range(100)} == {1, 3}
    with pytest.raises(InvalidInputError, match="every token"):
        choose([1, 2], SamplingParams(suppress=frozenset({0, 1})))


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "inf"), (-np.inf, "-inf")])
def test_logits_that_are_no_numbers_are_an_error(bad, word):
    row = [bad, bad] if bad == -np.inf else [0, bad, 1]
    for params in (SamplingParams(), SamplingParams(temperature=0, suppress=frozenset({1}))):
        with pytest.raises(HalfbyteError, match=f"produced {word} instead"):
            choose(row, params)


def test_one_row_of_a_large_vocabulary_is_fast():
    logits = np.random.default_rng(0).normal(size=262144).astype(np.float32) * 3
    params = SamplingParams(top_k=64, top_p=0.95)
    times = []
    for position in range(20):
        start = perf_counter()
        choose(logits, params, position=position)
        times.append(perf_counter() - start)
    assert min(times) < 0.003


def greedy(logits, **options) -> int:
    found = {"history": (), **{k: options.pop(k) for k in ("chosen", "allowed") if k in options}}
    params = SamplingParams(temperature=0, **options)
    return sample(np.array(logits, np.float32), params, sequence=0, position=0, **found)


def test_presence_counts_once_and_frequency_every_time():
    logits = [5.0, 4.5, 0.0]
    assert greedy(logits) == greedy(logits, presence_penalty=0.4, chosen=(0, 0, 0)) == 0
    assert greedy(logits, presence_penalty=0.6, chosen=(0,)) == 1
    assert greedy(logits, frequency_penalty=0.2, chosen=(0, 0)) == 0
    assert greedy(logits, frequency_penalty=0.2, chosen=(0, 0, 0)) == 1
    assert greedy(logits, presence_penalty=-1.0, chosen=(1,)) == 1


def test_bias_is_added_and_a_mask_rules_out():
    logits = [5.0, 4.5, 0.0]
    assert greedy(logits, bias=((2, 6.0),)) == 2
    assert greedy(logits, allowed=bytes([0b110])) == 1
    assert greedy(logits, allowed=bytes([0b100]), bias=((2, -100.0),)) == 2
    for options in ({"allowed": bytes([0])}, {"suppress": frozenset({0, 1, 2})}):
        with pytest.raises(NothingLeftError, match="suppressed"):
            greedy(logits, **options)
