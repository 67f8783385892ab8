"""Products with stored weights: one family of kernels for one row and for a prompt.

Orientation: the weight is the left operand, the activations the right one: a tile is `BN` outputs
by `BM` rows, and rows are padded to at least 16. What a matrix instruction does along the outputs
and the inputs is then the same for every number of rows.

Order of a sum: chunks of 64 inputs ascending (`layout`), in each chunk the parts that share a scale
ascending; the inputs are cut into `SPLITS` pieces whose sums are added up in ascending order. The
pieces depend on the weight's shape alone. A few rows spread them over programs, and whichever
program comes last adds them up, in order; many rows go through them one after the other. So by
construction a row's result depends on nothing but the row, given that a matrix instruction treats
its columns alike; the latter is checked on a card, not known.

Alignment: planes begin at multiples of 256 bytes and a row's part of a chunk has 16 to 256, so
every load is of whole 16-byte words; operands lie in rows of any width, and are read in whole words
where that is a multiple of 8. Rows beyond a weight's own are padding and never stored.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from halfbyte.kernels.triton.numbers import (
    activated,
    capped,
    dot,
    group_at,
    group_line,
    half_byte,
    keep,
    line,
    number,
    operand,
    planes,
    rounded,
    stored,
)


@triton.jit
def inputs_of(x, x_at, first, K, WIDTH: tl.constexpr, EVEN: tl.constexpr, OPERAND: tl.constexpr):
    """[WIDTH, BM]: inputs `first` and on of the rows that begin at `x_at`."""
    k = first + tl.arange(0, WIDTH)
    at = x_at[None, :] + k[:, None]
    if EVEN:
        return operand(tl.load(x + at), OPERAND)
    else:
        return operand(tl.load(x + at, mask=(k < K)[:, None], other=0.0), OPERAND)


@triton.jit
def summed(
    x,
    x_at,
    weight,
    rows,
    tiles,
    chunks,
    first,
    last,
    K,
    BN: tl.constexpr,
    BM: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """[BN, BM] f32: the product over the chunks `[first, last)`, of weight rows [BN]."""
    codes, scales, more, step = planes(weight, tiles, chunks, KIND, NUMBER, SPAN)
    total = tl.zeros((BN, BM), tl.float32)
    if KIND == "plain":
        at = (line(rows, chunks, 64))[:, None] + tl.arange(0, 64)[None, :]
        for chunk in range(first, last):
            w = rounded(tl.load(codes + at + chunk * 4096).to(tl.float32), OPERAND)
            part = inputs_of(x, x_at, chunk * 64, K, 64, EVEN, OPERAND)
            total = dot(w, part, total)
    elif KIND == "bytes":
        at = line(rows, chunks, 64)[:, None] + tl.arange(0, 32)[None, :]
        scale_at = line(rows, chunks, 2)
        for chunk in range(first, last):
            for half in tl.static_range(2):
                byte = tl.load(codes + at + (chunk * 4096 + half * 32)).to(tl.uint32)
                code = number(byte ^ 128, 128)
                scale = tl.load(scales + scale_at + (chunk * 128 + half)).to(tl.float32)
                part = inputs_of(x, x_at, chunk * 64 + half * 32, K, 32, EVEN, OPERAND)
                total = dot(rounded(code * scale[:, None], OPERAND), part, total)
    elif KIND == "nibbles":
        at = line(rows, chunks, 32)[:, None] + tl.arange(0, 32)[None, :]
        scale_at = group_line(rows, chunks, SPAN)
        for chunk in range(first, last):
            pairs = tl.load(codes + at + chunk * 2048).to(tl.uint32)
            for half in tl.static_range(2):
                here = scale_at + group_at(chunk, half, SPAN)
                scale = tl.load(scales + here).to(tl.float32)
                if ZEROS:
                    shift = (tl.load(more + here).to(tl.float32) + 128.0) * scale
                else:
                    shift = scale * 136.0
                # All of it is exact: eight bits times eleven, and their difference.
                w = tl.fma(half_byte(pairs, half), scale[:, None], -shift[:, None])
                part = inputs_of(x, x_at, chunk * 64 + half * 32, K, 32, EVEN, OPERAND)
                total = dot(rounded(w, OPERAND), part, total)
    elif KIND != "sixes":
        at = line(rows, chunks, 32)[:, None] + tl.arange(0, 32)[None, :]
        high_at = line(rows, chunks // 4, 32)[:, None] + tl.arange(0, 32)[None, :]
        scale_at = line(rows, chunks, 4)
        step_at = line(rows, chunks // 4, 2)
        for chunk in range(first, last):
            pairs = tl.load(codes + at + chunk * 2048).to(tl.uint32)
            here = step_at + chunk // 4 * 128
            unit = tl.load(step + here).to(tl.float32)
            least = tl.load(step + here + 1).to(tl.float32)
            if KIND == "fives":
                bits = tl.load(more + high_at + chunk // 4 * 2048).to(tl.uint32)
                bits = bits >> (chunk % 4 * 2)
            for half in tl.static_range(2):
                code = (pairs >> (4 * half)) & 15
                if KIND == "fives":
                    code = code | (((bits >> half) & 1) << 4)
                at_scale = scale_at + (chunk * 256 + half)
                scale = unit * tl.load(scales + at_scale).to(tl.float32)
                minimum = least * tl.load(scales + at_scale + 2).to(tl.float32)
                w = tl.fma(number(code, 0), scale[:, None], -minimum[:, None])
                part = inputs_of(x, x_at, chunk * 64 + half * 32, K, 32, EVEN, OPERAND)
                total = dot(rounded(w, OPERAND), part, total)
    else:
        at = line(rows, chunks, 32)[:, None] + tl.arange(0, 16)[None, :]
        high_at = line(rows, chunks, 16)[:, None] + tl.arange(0, 16)[None, :]
        scale_at = line(rows, chunks, 4)
        step_at = line(rows, chunks // 4, 1)
        for chunk in range(first, last):
            bits = tl.load(more + high_at + chunk * 1024).to(tl.uint32)
            unit = tl.load(step + step_at + chunk // 4 * 64).to(tl.float32)
            for quarter in tl.static_range(4):
                pairs = tl.load(codes + at + (chunk * 2048 + quarter % 2 * 16)).to(tl.uint32)
                low = (pairs >> (quarter // 2 * 4)) & 15
                code = number(low | (((bits >> (2 * quarter)) & 3) << 4), 32)
                small = tl.load(scales + scale_at + (chunk * 256 + quarter)).to(tl.float32)
                scale = unit * small
                part = inputs_of(x, x_at, chunk * 64 + quarter * 16, K, 16, EVEN, OPERAND)
                total = dot(rounded(code * scale[:, None], OPERAND), part, total)
    return total


@triton.jit
def whole(
    x,
    x_at,
    weight,
    rows,
    tiles,
    chunks,
    K,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """[BN, BM] f32: the pieces one after the other."""
    total = tl.zeros((BN, BM), tl.float32)
    for piece in range(SPLITS):
        first = piece * PIECE
        part = summed(
            x, x_at, weight, rows, tiles, chunks, first, tl.minimum(first + PIECE, chunks), K,
            BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
        )  # fmt: skip
        total = total + part
    return total


@triton.jit
def combined(
    part, partial, tickets, tile, piece, SPLITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr
):
    """What all pieces of a tile add up to, and whether this program is the last and has it.

    Every program stores its piece and takes a ticket; whoever takes the last one finds all of them
    stored and adds them up by their numbers, not by when they came. It puts the tickets back.
    """
    at = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
    mine = partial + tile.to(tl.int64) * (SPLITS * BN * BM)
    tl.store(mine + piece * (BN * BM) + at, part, cache_modifier=".cg")
    tl.debug_barrier()
    last = tl.atomic_add(tickets + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    total = tl.zeros((BN, BM), tl.float32)
    if last:
        tl.debug_barrier()
        for other in range(SPLITS):
            total = total + tl.load(mine + other * (BN * BM) + at, cache_modifier=".cg")
        tl.store(tickets + tile, 0)
    return total, last


@triton.jit
def product(
    x,
    weight,
    out,
    bias,
    partial,
    tickets,
    count,
    weight1: tl.int64,
    weight2: tl.int64,
    out1: tl.int64,
    out2: tl.int64,
    N0,
    N1,
    N2,
    K,
    chunks,
    softcap,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPREAD: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out [R, N] = x [R, K] @ weight.T + bias, for up to three weights of one x.

    `weight1` and `out1` are how far the second weight and its output are from the first, in bytes
    and numbers. Grid: tiles of outputs of all weights, tiles of rows, pieces if they are spread.
    """
    tile = tl.program_id(0)
    ticket = tile
    N = N0
    if SEGMENTS > 1:
        start1 = tl.cdiv(N0, BN)
        start2 = start1 + tl.cdiv(N1, BN)
        second, third = tile >= start1, tile >= start2
        N = tl.where(third, N2, tl.where(second, N1, N0))
        weight += tl.where(third, weight2, tl.where(second, weight1, 0))
        out += tl.where(third, out2, tl.where(second, out1, 0))
        tile -= tl.where(third, start2, tl.where(second, start1, 0))
    live = tl.load(count)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    if tl.program_id(1) * BM < live:
        n = tile * BN + tl.arange(0, BN)
        tiles = tl.cdiv(N, 64)
        rows = tl.minimum(n, tiles * 64 - 1)
        x_at = tl.minimum(m, live - 1).to(tl.int64) * K
        done = True
        if SPREAD:
            piece = tl.program_id(2)
            first = piece * PIECE
            part = summed(
                x, x_at, weight, rows, tiles, chunks, first, tl.minimum(first + PIECE, chunks), K,
                BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
            )  # fmt: skip
            total, done = combined(part, partial, tickets, ticket, piece, SPLITS, BN, BM)
        else:
            total = whole(
                x, x_at, weight, rows, tiles, chunks, K, PIECE, SPLITS,
                BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
            )  # fmt: skip
        if done:
            if bias is not None:
                total += tl.load(bias + n, mask=n < N, other=0.0)[:, None]
            if softcap is not None:
                total = capped(total, softcap)
            at = m.to(tl.int64)[None, :] * N + n[:, None]
            tl.store(out + at, total, mask=(n < N)[:, None] & (m < live)[None, :])


@triton.jit
def gated(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    other,
    count,
    N,
    K,
    chunks,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out [R, N] = activation(x @ gate.T) * (x @ up.T). Grid: tiles of outputs, tiles of rows."""
    live = tl.load(count)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    if tl.program_id(1) * BM < live:
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        tiles = tl.cdiv(N, 64)
        rows = tl.minimum(n, tiles * 64 - 1)
        x_at = tl.minimum(m, live - 1).to(tl.int64) * K
        first = whole(
            x, x_at, gate, rows, tiles, chunks, K, PIECE, SPLITS,
            BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
        )  # fmt: skip
        second = whole(
            x, x_at, up, rows, tiles, chunks, K, PIECE, SPLITS,
            BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
        )  # fmt: skip
        if gate_bias is not None:
            first += tl.load(gate_bias + n, mask=n < N, other=0.0)[:, None]
            second += tl.load(up_bias + n, mask=n < N, other=0.0)[:, None]
        at = m.to(tl.int64)[None, :] * N + n[:, None]
        mask = (n < N)[:, None] & (m < live)[None, :]
        keep(out, other, at, activated(first, ACTIVATION) * second, mask, OPERAND)


@triton.jit
def routed(
    x,
    weight,
    out,
    other,
    members,
    counts,
    N,
    K,
    chunks,
    tiles,
    per_row,
    x_per_row,
    capacity,
    out_width,
    PIECE: tl.constexpr,
    SPLITS: tl.constexpr,
    GATED: tl.constexpr,
    CLUSTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    EVEN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Products of rows with the groups of a weight's rows that they were routed to.

    Group `e` (an expert, a cluster of the head) has the entries `members[e, :counts[e]]`, numbers
    `row * per_row + place`; an entry's activations are row `entry // x_per_row` of x. `GATED`: a
    group is N rows of a gate and N of an up projection, and out [entries, N] their gated product.
    `CLUSTERS`: out [R, V], an entry fills the columns of its cluster. Grid: groups, tiles of
    entries, tiles of outputs.
    """
    group = tl.program_id(0)
    live = tl.load(counts + group)
    place = tl.program_id(1) * BM + tl.arange(0, BM)
    if tl.program_id(1) * BM < live:
        entry = tl.load(members + group * capacity + tl.minimum(place, live - 1)).to(tl.int64)
        x_at = entry // x_per_row * K
        n = tl.program_id(2) * BN + tl.arange(0, BN)
        height = 2 * N if GATED else N
        rows = group * height + tl.minimum(n, N - 1)
        total = whole(
            x, x_at, weight, rows, tiles, chunks, K, PIECE, SPLITS,
            BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
        )  # fmt: skip
        if GATED:
            second = whole(
                x, x_at, weight, rows + N, tiles, chunks, K, PIECE, SPLITS,
                BN, BM, KIND, NUMBER, SPAN, ZEROS, EVEN, OPERAND,
            )  # fmt: skip
            total = activated(total, ACTIVATION) * second
        if CLUSTERS:
            at = (entry // per_row * out_width + group * N)[None, :] + n[:, None]
        else:
            at = (entry * out_width)[None, :] + n[:, None]
        keep(out, other, at, total, (n < N)[:, None] & (place < live)[None, :], OPERAND)


@triton.jit
def narrow(
    x,
    a,
    inner,
    adapters,
    count,
    adapter,
    K,
    rank,
    tiles,
    chunks,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """inner [R, rank] = x @ a.T in f32, for the rows of one adapter. Grid: rows, rank."""
    row, index = tl.program_id(0), tl.program_id(1)
    if row < tl.load(count) and tl.load(adapters + row) == adapter:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            inside = k < K
            mine = tl.load(x + row.to(tl.int64) * K + k, mask=inside, other=0.0)
            other = stored(
                a, index, tl.where(inside, k, 0), tiles, chunks, KIND, NUMBER, SPAN, ZEROS
            )
            total += mine * other
        tl.store(inner + row * rank + index, tl.sum(total, 0))


@triton.jit
def widened(
    inner,
    b,
    out,
    adapters,
    count,
    adapter,
    scale,
    N,
    rank,
    tiles,
    chunks,
    BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """out [R, N] += scale * inner @ b.T in f32, on the rows of one adapter. Grid: rows, outputs."""
    row = tl.program_id(0)
    if row < tl.load(count) and tl.load(adapters + row) == adapter:
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        index = tl.arange(0, RANK)
        inside = (n < N)[:, None] & (index < rank)[None, :]
        w = stored(
            b,
            tl.where(n < N, n, 0)[:, None],
            tl.where(index < rank, index, 0)[None, :],
            tiles,
            chunks,
            KIND,
            NUMBER,
            SPAN,
            ZEROS,
        )
        mine = tl.load(inner + row * rank + index, mask=index < rank, other=0.0)
        added = tl.sum(tl.where(inside, w * mine[None, :], 0.0), 1) * scale
        at = row.to(tl.int64) * N + n
        tl.store(out + at, tl.load(out + at, mask=n < N, other=0.0) + added, mask=n < N)


@triton.jit
def embedded(
    ids,
    table,
    out,
    other,
    count,
    scale,
    width,
    tiles,
    chunks,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out [R, width]: the table's row of every token, times `scale`. Grid: rows, blocks."""
    row = tl.program_id(0)
    if row < tl.load(count):
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < width
        token = tl.load(ids + row)
        values = stored(
            table, token, tl.where(inside, k, 0), tiles, chunks, KIND, NUMBER, SPAN, ZEROS
        )
        keep(out, other, row.to(tl.int64) * width + k, values * scale, inside, OPERAND)
