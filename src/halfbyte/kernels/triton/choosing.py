"""From rows of logits to tokens, on the device: the filters and the noise of sampling.

What is computed is what `engine/sampling.py` and `engine/noise.py` define, in the same order and in
f64 where they are: temperature, top-k, top-p, min-p, and the arg max of log-weights plus Gumbel
noise, a function of (seed, sequence, position, token id). Nothing is sorted: a border is found
digit by digit, for top-k of counts and for top-p of mass. Tokens are ordered by a key of 52 bits,
the score's 32 and below them the id's, inverted: no two are equal, and of equal scores the lower id
comes first. A border is the smallest key above which less than the limit lies.

Mass is whole numbers of 2**-40 of the best token's, so that sums are the same in any order; NumPy's
f64 sums differ from them by less than 2**-40 for each token. Programs have a block of a row each.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

DIGITS = tl.constexpr(13)  # of four bits each
DIGIT_VALUES = tl.constexpr(16)
ID_BITS = tl.constexpr(20)
FIELDS = tl.constexpr(16)  # int32 words that describe a row's draw (`step`)
ONE = tl.constexpr(1 << 40)
# The widest that the noise of two tokens can be apart (`noise.SPAN`).
SPAN = tl.constexpr(20.18104240338401)


@triton.jit
def number64(draws, row, FIELD: tl.constexpr):
    """An f64 from two words."""
    low = tl.load(draws + row * FIELDS + FIELD).to(tl.uint32).to(tl.int64)
    high = tl.load(draws + row * FIELDS + FIELD + 1).to(tl.int64)
    return ((high << 32) | low).to(tl.float64, bitcast=True)


@triton.jit
def key_of(score, token):
    """int64 of 52 bits: greater for better scores, and of equal ones for lower ids."""
    score = tl.where(score == 0, 0.0, score)  # no -0, which is equal and looks smaller
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    return (order << ID_BITS) | (1048575 - token).to(tl.int64)


@triton.jit
def best_of(peaks, row, blocks, BLOCKS: tl.constexpr):
    """The best score of a row."""
    at = tl.arange(0, BLOCKS)
    return tl.max(tl.load(peaks + row * blocks + at, mask=at < blocks, other=float("-inf")), 0)


@triton.jit
def banned(logits, draws, ids, count, vocab, MOST: tl.constexpr):
    """Takes suppressed ids out of the rows. Grid: rows."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.arange(0, MOST)
        mask = at < tl.load(draws + row * FIELDS + 13)
        token = tl.load(ids + row * MOST + at, mask=mask, other=0)
        nothing = tl.full((MOST,), float("-inf"), tl.float32)
        tl.store(logits + row.to(tl.int64) * vocab + token, nothing, mask=mask)


@triton.jit
def peaked(
    logits,
    peaks,
    seconds,
    places,
    broken,
    above,
    count,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
):
    """The best score of every block, where it is, the next best, and whether there is a NaN.

    Clears `above`. Grid: rows, blocks.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    if row < tl.load(count):
        token = block * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(
            logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf")
        )
        nan = (score != score).to(tl.int32)
        score = tl.where(nan > 0, float("-inf"), score)
        tl.store(peaks + row * blocks + block, tl.max(score, 0))
        place = tl.argmax(score, 0, tie_break_left=True)
        tl.store(places + row * blocks + block, block * BLOCK + place)
        others = tl.where(tl.arange(0, BLOCK) == place, float("-inf"), score)
        tl.store(seconds + row * blocks + block, tl.max(others, 0))
        tl.store(broken + row * blocks + block, tl.max(nan, 0))
        if block == 0:
            size: tl.constexpr = 1024
            at = tl.arange(0, size)
            words: tl.constexpr = 2 * DIGITS * DIGIT_VALUES + 1
            tl.store(above + row * words + at, tl.zeros((size,), tl.int64), mask=at < words)


@triton.jit
def border(above, draws, row, digits, best, FILTER: tl.constexpr):
    """The digits of a border that are known, and the limit; the border is exact after the last."""
    words: tl.constexpr = 2 * DIGITS * DIGIT_VALUES + 1
    if FILTER == 0:
        limit = tl.load(draws + row * FIELDS).to(tl.float64)
        start = 0
    else:
        whole = tl.load(above + row * words + 2 * DIGITS * DIGIT_VALUES).to(tl.float64)
        limit = number64(draws, row, 8) * whole
        start = DIGITS * DIGIT_VALUES
    found = limit.to(tl.int64) * 0
    value = tl.arange(0, DIGIT_VALUES)
    for digit in range(digits):
        sums = tl.load(above + row * words + start + digit * DIGIT_VALUES + value)
        reached = (sums.to(tl.float64) >= limit).to(tl.int64)
        found = (found << 4) | tl.sum(reached, 0)
    return found


@triton.jit(do_not_specialize=["digit"])
def measured(
    logits,
    draws,
    peaks,
    above,
    count,
    vocab,
    blocks,
    digit,
    FILTER: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What of a row lies above each value that the next digit of a border may have.

    `FILTER` 0 counts tokens for top-k; 1 weighs those that top-k leaves, for top-p, and before the
    first digit (-1) all of them. Grid: rows, blocks.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    words: tl.constexpr = 2 * DIGITS * DIGIT_VALUES + 1
    if row < tl.load(count):
        heat = number64(draws, row, 6)
        active = tl.load(draws + row * FIELDS) > 0
        if FILTER == 1:
            active = number64(draws, row, 8) < 1.0
        if active & (heat > 0):
            token = block * BLOCK + tl.arange(0, BLOCK)
            inside = token < vocab
            score = tl.load(logits + row.to(tl.int64) * vocab + token, mask=inside, other=0.0)
            key = key_of(score, token)
            best = best_of(peaks, row, blocks, BLOCKS)
            measure = inside.to(tl.int64)
            if FILTER == 1:
                weight = (score.to(tl.float64) - best.to(tl.float64)) / heat
                measure = (tl.exp(weight) * ONE).to(tl.int64)
                inside = inside & (key >= kept_by_top_k(above, draws, row, best))
                measure = tl.where(inside, measure, 0)
            if digit < 0:
                tl.atomic_add(above + row * words + 2 * DIGITS * DIGIT_VALUES, tl.sum(measure, 0))
            else:
                known = border(above, draws, row, digit, best, FILTER)
                shift = (digit * -4 + 4 * (DIGITS - 1)).to(tl.int64)
                value = tl.arange(0, DIGIT_VALUES).to(tl.int64)
                lower = (tl.full((1,), 1, tl.int64) << shift) - 1
                tried = (((known << 4) | value) << shift) | lower
                higher = key[:, None] > tried[None, :]
                sums = tl.sum(tl.where(higher, measure[:, None], 0), 0)
                at = digit * DIGIT_VALUES + FILTER * DIGITS * DIGIT_VALUES
                tl.atomic_add(above + row * words + at + tl.arange(0, DIGIT_VALUES), sums)


@triton.jit
def kept_by_top_k(above, draws, row, best):
    """The smallest key that top-k leaves; 0 where it is off."""
    lowest = border(above, draws, row, DIGITS, best, 0)
    return tl.where(tl.load(draws + row * FIELDS) > 0, lowest, 0)


@triton.jit
def philox(token, position, low, high, seed_low, seed_high):
    """The first word of Philox4x32-10 (`engine/noise.py`)."""
    c0, c1 = token.to(tl.uint32), (token * 0 + position).to(tl.uint32)
    c2, c3 = (token * 0 + low).to(tl.uint32), (token * 0 + high).to(tl.uint32)
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        left_high, left = tl.umulhi(c0, c0 * 0 + 0xD2511F53), c0 * 0xD2511F53
        right_high, right = tl.umulhi(c2, c2 * 0 + 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1 = right_high ^ c1 ^ k0, right
        c2, c3 = left_high ^ c3 ^ k1, left
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0


@triton.jit
def drawn(
    logits,
    draws,
    peaks,
    above,
    scores,
    places,
    count,
    vocab,
    blocks,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best sum of log-weight and noise in every block, and where it is. Grid: rows, blocks."""
    row, block = tl.program_id(0), tl.program_id(1)
    if row < tl.load(count):
        heat = number64(draws, row, 6)
        if heat > 0:
            token = block * BLOCK + tl.arange(0, BLOCK)
            inside = token < vocab
            score = tl.load(logits + row.to(tl.int64) * vocab + token, mask=inside, other=0.0)
            best = best_of(peaks, row, blocks, BLOCKS)
            weight = (score.to(tl.float64) - best.to(tl.float64)) / heat
            key = key_of(score, token)
            able = inside & (weight >= -SPAN) & (key >= kept_by_top_k(above, draws, row, best))
            if number64(draws, row, 8) < 1.0:
                able = able & (key >= border(above, draws, row, DIGITS, best, 1))
            least = number64(draws, row, 10)
            able = able & (tl.exp(weight) >= least)
            at = draws + row * FIELDS
            sum_of = tl.full((BLOCK,), float("-inf"), tl.float64)
            if tl.max(able.to(tl.int32), 0) > 0:
                word = philox(
                    token, tl.load(at + 1), tl.load(at + 4), tl.load(at + 5),
                    tl.load(at + 2), tl.load(at + 3),
                )  # fmt: skip
                uniform = ((word >> 8).to(tl.float64) + 0.5) * 5.9604644775390625e-08
                sum_of = tl.where(able, weight - tl.log(-tl.log(uniform)), sum_of)
            tl.store(scores + row * blocks + block, tl.max(sum_of, 0))
            place = tl.argmax(sum_of, 0, tie_break_left=True)
            tl.store(places + row * blocks + block, block * BLOCK + place)


@triton.jit
def decided(
    draws,
    peaks,
    seconds,
    peak_places,
    broken,
    scores,
    places,
    tokens,
    count,
    blocks,
    BLOCKS: tl.constexpr,
):
    """tokens [R, 2]: a choice for every row, -1 for a NaN, -2 for an infinite best; and the bits of
    how far the best score is above the next. Grid: rows."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.arange(0, BLOCKS)
        inside = at < blocks
        here = row * blocks + at
        peak = tl.load(peaks + here, mask=inside, other=float("-inf"))
        nan = tl.max(tl.load(broken + here, mask=inside, other=0), 0)
        highest = tl.argmax(peak, 0, tie_break_left=True)
        second = tl.load(seconds + here, mask=inside, other=float("-inf"))
        rest = tl.max(tl.where(at == highest, second, peak), 0)
        if number64(draws, row, 6) > 0:
            score = tl.load(scores + here, mask=inside, other=float("-inf"))
            token = tl.load(places + row * blocks + tl.argmax(score, 0, tie_break_left=True))
        else:
            token = tl.load(peak_places + row * blocks + highest)
        best = tl.max(peak, 0)
        token = tl.where((best == float("-inf")) | (best == float("inf")), -2, token)
        tl.store(tokens + 2 * row, tl.where(nan > 0, -1, token))
        tl.store(tokens + 2 * row + 1, (best - rest).to(tl.int32, bitcast=True))
