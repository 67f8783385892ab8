"""The noise of sampling: a pure function of (seed, sequence, position, token id).

No generator has a state, so the noise of a token is the same alone or in a batch, with or without
speculation, and for any subset of the vocabulary; whatever draws tokens must reproduce it:

    words    = Philox4x32-10(counter = (token id, position, sequence low, sequence high),
                             key     = (seed low, seed high))          32-bit words, low word first
    uniform  = ((words[0] >> 8) + 0.5) * 2**-24                         in (0, 1), exact in float64
    gumbel   = -log(-log(uniform))                                     in float64

`position` is the absolute position of the token that is being chosen: the number of ids before it.
`sequence` is a property of the request (`Request.sequence`), never of the batch.

The price of 24 bits: noise lies in [-2.86, 17.33], so a token more than `SPAN` below the best one
can never be chosen: it is less than 2e-9 times as likely. Leaving it out is exact.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from math import log

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_HALF = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)

HIGHEST = -log(-log(1 - 2.0**-25))
LOWEST = -log(-log(2.0**-25))
SPAN = HIGHEST - LOWEST


def philox(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, ...]:
    """Philox4x32-10 of every counter: four arrays of 32-bit words, each held in a uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left, right = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (right >> _HALF) ^ c1 ^ k0, right & _LOW
        c2, c3 = (left >> _HALF) ^ c3 ^ k1, left & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniform(
    token_ids: NDArray[np.intp], *, seed: int, sequence: int, position: int
) -> NDArray[np.float64]:
    """One number in (0, 1) per token id, as the module defines it."""
    low, high = _words(sequence)
    counter = (token_ids.astype(np.uint64), _words(position)[0], low, high)
    words = philox(counter, _words(seed))
    return ((words[0] >> np.uint64(8)).astype(np.float64) + 0.5) * 2.0**-24


def gumbel(
    token_ids: NDArray[np.intp], *, seed: int, sequence: int, position: int
) -> NDArray[np.float64]:
    """One draw of the standard Gumbel distribution per token id."""
    draws = uniform(token_ids, seed=seed, sequence=sequence, position=position)
    return -np.log(-np.log(draws))


def _words(number: int) -> tuple[Words, Words]:
    """The two 32-bit words of a number below 2**64, low word first, as arrays of one."""
    whole = np.array([number], dtype=np.uint64)
    return whole & _LOW, whole >> _HALF
