"""Which groups (experts, clusters of a head) each row goes to, and which rows each group has.

A row's choice is made by one program; the entries of a group are listed in the order of rows, so
nothing depends on who runs first. Sums over a row's experts go by ascending index.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from halfbyte.kernels.triton.numbers import keep


@triton.jit
def chosen(
    scores,
    scale,
    entries,
    weights,
    count,
    groups,
    score_scale,
    USED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """entries [R, USED]: the groups of the best scores, ascending; of equal ones the lower first.

    With `WEIGHTED`, weights [R, USED]: softmax probabilities of `scores * score_scale` over the sum
    of the chosen ones', times the group's `scale`. Grid: rows.
    """
    row = tl.program_id(0)
    if row < tl.load(count):
        group = tl.arange(0, BLOCK)
        inside = group < groups
        values = tl.load(scores + row.to(tl.int64) * groups + group, mask=inside, other=0.0)
        values = tl.where(inside, values * score_scale, float("-inf"))
        left = values
        taken = group < 0
        for _ in range(USED):
            best = tl.argmax(left, 0, tie_break_left=True)
            taken = taken | (group == best)
            left = tl.where(group == best, float("-inf"), left)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        at = row * USED + place
        tl.store(entries + at, group, mask=taken)
        if WEIGHTED:
            likely = tl.exp(values - tl.max(values, 0))
            likely = tl.where(inside, likely, 0.0)
            likely = likely / tl.sum(likely, 0)
            total = tl.sum(tl.where(taken, likely, 0.0), 0)
            own = tl.load(scale + group, mask=inside, other=0.0)
            tl.store(weights + at, likely / total * own, mask=taken)


@triton.jit
def listed(
    entries,
    members,
    counts,
    count,
    capacity,
    USED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """members [groups, capacity], counts [groups]: the entries `row * USED + place` of each group.

    Grid: groups.
    """
    group = tl.program_id(0)
    live = tl.load(count)
    found = 0
    place = tl.arange(0, WIDE)
    for start in range(0, live, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = (row < live)[:, None] & (place < USED)[None, :]
        entry = row[:, None] * USED + place[None, :]
        mine = inside & (tl.load(entries + entry, mask=inside, other=-1) == group)
        any_place = tl.sum(mine.to(tl.int32), 1)
        which = tl.sum(tl.where(mine, entry, 0), 1)
        at = found + tl.cumsum(any_place, 0) - 1
        tl.store(members + group * capacity + at, which, mask=any_place > 0)
        found += tl.sum(any_place, 0)
    tl.store(counts + group, found)


@triton.jit
def mixed(
    x,
    weights,
    out,
    other,
    count,
    width,
    USED: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out [R, width]: the weighted sum of a row's entries in x [R * USED, width]. Grid: rows,
    blocks."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        total = tl.zeros((BLOCK,), tl.float32)
        for place in range(USED):
            entry = row.to(tl.int64) * USED + place
            part = tl.load(x + entry * width + at, mask=inside, other=0.0)
            total += part * tl.load(weights + entry)
        keep(out, other, row.to(tl.int64) * width + at, total, inside, OPERAND)
