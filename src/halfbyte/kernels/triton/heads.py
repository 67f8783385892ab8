"""Attention by heads: norms and rotation of queries and keys, the cells they go to, and softmax
attention over them.

A head is held as its two halves, because a rotation turns pairs `(i, i + D / 2)`; so a key can be
made of its value where only that is kept. Cells lie by kept kind (keys, values), head, cell and
dimension; those of q8_0 are rotated by a Hadamard matrix, with an fp16 scale per 32 behind all
codes. Queries are rotated likewise, and the output back, which costs nothing per cell.

Order of a sum: positions are cut into pieces of `PIECE` and tiles of `KEYS`, both aligned to
absolute positions. A piece is an online softmax over its tiles (Milakov and Gimelshein, arXiv
1805.02867); pieces are merged in ascending order. A few rows spread the pieces over programs and
the last program merges them; many rows go through them one after the other, with the same two
functions. What a row does not see changes nothing, not even a bit. Keys are the left operand and
rows the right one, as in `products`.

Alignment: a page or ring is whole tiles of 64 cells, so a tile of keys is one run of memory.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

from halfbyte.kernels.triton.numbers import dot, keep, operand, rounded

NOTHING = tl.constexpr(-1e30)  # finite: minus itself it makes no NaN


@triton.jit
def cell_of(position, sequence, pages, rings, stride, most_pages, SLIDING: tl.constexpr):
    """The cell of a position of a sequence."""
    if SLIDING:
        return tl.load(rings + sequence).to(tl.int64) * stride + position % stride
    else:
        page = tl.load(pages + sequence * most_pages + position // stride)
        return page.to(tl.int64) * stride + position % stride


@triton.jit
def mixed_within(x, SIZE: tl.constexpr, STAGES: tl.constexpr):
    """[SIZE]: x times the Hadamard matrix of 1 and -1, by `STAGES` rounds of sums in pairs."""
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(x, (SIZE // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 2, 1)))
        pairs = tl.join(first + second, first - second)
        x = tl.reshape(tl.permute(pairs, (0, 2, 1)), (SIZE,))
    return x


@triton.jit
def mixed_halves(first, second, HALF: tl.constexpr, STAGES: tl.constexpr):
    """Both halves of a head times the orthonormal Hadamard matrix of its size, `2 * HALF`."""
    first, second = mixed_within(first, HALF, STAGES), mixed_within(second, HALF, STAGES)
    size = 1.0 / tl.sqrt(2.0 * HALF + tl.zeros((1,), tl.float32))
    return (first + second) * size, (first - second) * size


@triton.jit
def eighth_bits(x, HALF: tl.constexpr):
    """int8 codes [HALF] and scales [HALF / 32] of one half: Q8_0's rule, halves away from zero."""
    blocks = tl.reshape(x, (HALF // 32, 32))
    scale = tl.max(tl.abs(blocks), 1) / 127.0
    inverse = tl.where(scale > 0, 1.0 / tl.where(scale > 0, scale, 1.0), 0.0)
    steps = blocks * inverse[:, None]
    codes = tl.where(steps >= 0, tl.floor(steps + 0.5), -tl.floor(0.5 - steps))
    return tl.reshape(codes, (HALF,)).to(tl.int8), scale.to(tl.float16)


@triton.jit
def put(
    cells,
    kept,
    index,
    first,
    second,
    num_cells,
    KINDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    CELL: tl.constexpr,
):
    """Stores the halves of a head in its cell; `index` is `head * num_cells + cell`."""
    d = tl.arange(0, HALF)
    inside = d < D // 2
    row = kept * KV_HEADS * num_cells.to(tl.int64) + index
    at = row * D + d
    if CELL == "f32":
        numbers = cells.to(tl.pointer_type(tl.float32))
        tl.store(numbers + at, first, mask=inside)
        tl.store(numbers + at + D // 2, second, mask=inside)
    elif CELL == "bf16":
        numbers = cells.to(tl.pointer_type(tl.bfloat16))
        tl.store(numbers + at, rounded(first, "bf16-f32").to(tl.bfloat16), mask=inside)
        tl.store(numbers + at + D // 2, rounded(second, "bf16-f32").to(tl.bfloat16), mask=inside)
    else:
        first, second = mixed_halves(first, second, HALF, STAGES)
        codes = cells.to(tl.pointer_type(tl.int8))
        behind = KINDS * KV_HEADS * num_cells.to(tl.int64) * D
        scales = (cells + behind).to(tl.pointer_type(tl.float16)) + row * (D // 32)
        block = tl.arange(0, HALF // 32)
        code, scale = eighth_bits(first, HALF)
        tl.store(codes + at, code)
        tl.store(scales + block, scale)
        code, scale = eighth_bits(second, HALF)
        tl.store(codes + at + HALF, code)
        tl.store(scales + HALF // 32 + block, scale)


@triton.jit
def cells_at(
    cells,
    kept,
    index,
    second: tl.constexpr,
    num_cells,
    KINDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    CELL: tl.constexpr,
):
    """[S, HALF] f32: the first or the `second` half of the heads at `index` [S]."""
    d = tl.arange(0, HALF)
    row = kept * KV_HEADS * num_cells.to(tl.int64) + index
    at = (row * D + second * (D // 2))[:, None] + d[None, :]
    inside = (d < D // 2)[None, :]
    if CELL == "f32":
        return tl.load(cells.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    elif CELL == "bf16":
        numbers = cells.to(tl.pointer_type(tl.bfloat16))
        if D == 2 * HALF:
            found = tl.load(numbers + at)
        else:
            found = tl.load(numbers + at, mask=inside, other=0.0)
        return found.to(tl.float32)
    else:
        behind = KINDS * KV_HEADS * num_cells.to(tl.int64) * D
        scales = (cells + behind).to(tl.pointer_type(tl.float16))
        scale_at = (row * (D // 32) + second * (D // 64))[:, None] + (d // 32)[None, :]
        codes = tl.load(cells.to(tl.pointer_type(tl.int8)) + at).to(tl.float32)
        return codes * tl.load(scales + scale_at).to(tl.float32)


@triton.jit
def head_normal(first, second, weight, D: tl.constexpr, HALF: tl.constexpr, eps):
    """The RMS norm of a head in halves; weight may be None."""
    d = tl.arange(0, HALF)
    mean = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D
    scale = 1.0 / tl.sqrt(mean + eps)
    first, second = first * scale, second * scale
    if weight is not None:
        inside = d < D // 2
        first = first * tl.load(weight + d, mask=inside, other=0.0)
        second = second * tl.load(weight + D // 2 + d, mask=inside, other=0.0)
    return first, second


@triton.jit
def spun(first, second, position, frequencies, D: tl.constexpr, HALF: tl.constexpr):
    """The halves of a head, every pair rotated by its angle at a position."""
    d = tl.arange(0, HALF)
    turn = position.to(tl.float32) * tl.load(frequencies + d, mask=d < D // 2, other=0.0)
    cos, sin = tl.cos(turn), tl.sin(turn)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def turned(
    q,
    k,
    v,
    q_norm,
    k_norm,
    frequencies,
    out,
    other,
    cells,
    positions,
    sequences,
    pages,
    rings,
    count,
    ahead,
    eps,
    num_cells,
    stride,
    most_pages,
    Q_NORMED: tl.constexpr,
    K_NORMED: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KINDS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    SLIDING: tl.constexpr,
    CELL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Queries [R, HEADS * D] normed and rotated; keys and values normed, rotated and kept.

    Grid: rows, query heads (and key heads and value heads, if `KV_HEADS`).
    """
    row, head = tl.program_id(0), tl.program_id(1)
    if row < tl.load(count):
        position, sequence = tl.load(positions + row), tl.load(sequences + row)
        d = tl.arange(0, HALF)
        inside = d < D // 2
        if head < HEADS:
            at = (row.to(tl.int64) * HEADS + head) * D + d
            first = tl.load(q + at, mask=inside, other=0.0)
            second = tl.load(q + at + D // 2, mask=inside, other=0.0)
            if Q_NORMED:
                first, second = head_normal(first, second, q_norm, D, HALF, eps)
            first, second = spun(first, second, position + ahead, frequencies, D, HALF)
            keep(out, other, at, first, inside, OPERAND)
            keep(out, other, at + D // 2, second, inside, OPERAND)
        elif KV_HEADS > 0:
            kv_head = (head - HEADS) % KV_HEADS
            cell = cell_of(position, sequence, pages, rings, stride, most_pages, SLIDING)
            index = kv_head * num_cells.to(tl.int64) + cell
            at = (row.to(tl.int64) * KV_HEADS + kv_head) * D + d
            if head < HEADS + KV_HEADS:
                if KINDS == 2:
                    first = tl.load(k + at, mask=inside, other=0.0)
                    second = tl.load(k + at + D // 2, mask=inside, other=0.0)
                    if K_NORMED:
                        first, second = head_normal(first, second, k_norm, D, HALF, eps)
                    first, second = spun(first, second, position, frequencies, D, HALF)
                    put(
                        cells, 0, index, first, second, num_cells,
                        KINDS, KV_HEADS, D, HALF, STAGES, CELL,
                    )  # fmt: skip
            else:
                first = tl.load(v + at, mask=inside, other=0.0)
                second = tl.load(v + at + D // 2, mask=inside, other=0.0)
                if VALUE_NORM:
                    first, second = head_normal(first, second, None, D, HALF, eps)
                put(
                    cells, KINDS - 1, index, first, second, num_cells,
                    KINDS, KV_HEADS, D, HALF, STAGES, CELL,
                )  # fmt: skip


@triton.jit
def mixed(
    x,
    out,
    other,
    count,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Every head of x [R, HEADS * 2 * HALF] times the Hadamard matrix. Grid: rows, heads."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = (row.to(tl.int64) * HEADS + tl.program_id(1)) * (2 * HALF) + tl.arange(0, HALF)
        first, second = mixed_halves(tl.load(x + at), tl.load(x + at + HALF), HALF, STAGES)
        keep(out, other, at, first, at >= 0, OPERAND)
        keep(out, other, at + HALF, second, at >= 0, OPERAND)


@triton.jit
def piece_of(
    q1,
    q2,
    cells,
    k_norm,
    frequencies,
    pages,
    rings,
    head,
    sequence,
    position,
    first,
    last,
    window,
    scale,
    num_cells,
    stride,
    most_pages,
    KEYS: tl.constexpr,
    BQ: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KINDS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SLIDING: tl.constexpr,
    CELL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Online softmax over the positions `[first, last)` of one piece, `first` a tile's begin.

    q1, q2 [HALF, BQ]: halves of the queries at `position` [BQ]. Returns the greatest score, the sum
    of weights (both [BQ]) and the weighted values' halves [HALF, BQ].
    """
    peak = tl.full((BQ,), NOTHING, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    mixed1 = tl.zeros((HALF, BQ), tl.float32)
    mixed2 = tl.zeros((HALF, BQ), tl.float32)
    d = tl.arange(0, HALF)
    if KINDS == 1:
        inside = d < D // 2
        norm1 = tl.load(k_norm + d, mask=inside, other=0.0)[None, :]
        norm2 = tl.load(k_norm + D // 2 + d, mask=inside, other=0.0)[None, :]
        turns = tl.load(frequencies + d, mask=inside, other=0.0)[None, :]
    for start in range(first, last, KEYS):
        cell = cell_of(start, sequence, pages, rings, stride, most_pages, SLIDING)
        index = head * num_cells.to(tl.int64) + cell + tl.arange(0, KEYS)
        place = start + tl.arange(0, KEYS)
        v1 = cells_at(cells, KINDS - 1, index, 0, num_cells, KINDS, KV_HEADS, D, HALF, CELL)
        v2 = cells_at(cells, KINDS - 1, index, 1, num_cells, KINDS, KV_HEADS, D, HALF, CELL)
        if KINDS == 1:
            angle = place.to(tl.float32)[:, None] * turns
            cos, sin = tl.cos(angle), tl.sin(angle)
            n1, n2 = v1 * norm1, v2 * norm2
            k1, k2 = n1 * cos - n2 * sin, n2 * cos + n1 * sin
        else:
            k1 = cells_at(cells, 0, index, 0, num_cells, KINDS, KV_HEADS, D, HALF, CELL)
            k2 = cells_at(cells, 0, index, 1, num_cells, KINDS, KV_HEADS, D, HALF, CELL)
        scores = dot(rounded(k1, OPERAND), q1, tl.zeros((KEYS, BQ), tl.float32))
        scores = dot(rounded(k2, OPERAND), q2, scores) * scale
        seen = (place[:, None] <= position[None, :]) & (place[:, None] > position[None, :] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 0))
        weights = tl.exp(scores - higher[None, :])
        fade = tl.exp(peak - higher)
        total = total * fade + tl.sum(weights, 0)
        held = rounded(weights, OPERAND)
        mixed1 = dot(tl.trans(rounded(v1, OPERAND)), held, mixed1 * fade[None, :])
        mixed2 = dot(tl.trans(rounded(v2, OPERAND)), held, mixed2 * fade[None, :])
        peak = higher
    return peak, total, mixed1, mixed2


@triton.jit
def merged(peak, total, mixed1, mixed2, peak_b, total_b, mixed1_b, mixed2_b):
    """Two pieces as one, the second after the first."""
    higher = tl.maximum(peak, peak_b)
    fade, rise = tl.exp(peak - higher), tl.exp(peak_b - higher)
    return (
        higher,
        total * fade + total_b * rise,
        mixed1 * fade[None, :] + mixed1_b * rise[None, :],
        mixed2 * fade[None, :] + mixed2_b * rise[None, :],
    )


@triton.jit
def attended(
    q,
    cells,
    k_norm,
    frequencies,
    out,
    other,
    partial,
    tickets,
    positions,
    sequences,
    pages,
    rings,
    tile_first,
    tile_count,
    window,
    scale,
    num_cells,
    stride,
    most_pages,
    most_pieces,
    PIECE: tl.constexpr,
    SPREAD: tl.constexpr,
    KEYS: tl.constexpr,
    BQ: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KINDS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SLIDING: tl.constexpr,
    CELL: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Attention of the rows `[tile_first, tile_first + tile_count)` of each tile, of one sequence.

    q (operands) and out [R, HEADS * D]. A tile is `BQ` columns: its rows by `GROUP` query heads of
    a key head, padded. Grid: tiles, key heads, pieces if they are spread.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    rows = tl.load(tile_count + tile)
    if rows > 0:
        first = tl.load(tile_first + tile)
        start, sequence = tl.load(positions + first), tl.load(sequences + first)
        column = tl.arange(0, BQ)
        row, inner = column // GROUP, column % GROUP
        per_head: tl.constexpr = HEADS // KV_HEADS
        live = (row < rows) & (inner < per_head)
        position = start + row
        low, high = tl.maximum(start - window + 1, 0), start + rows
        low_piece, high_piece = low // PIECE, tl.cdiv(high, PIECE)
        d = tl.arange(0, HALF)
        inside = (d < D // 2)[:, None]
        q_row = (first + tl.minimum(row, rows - 1)).to(tl.int64) * HEADS
        at = (q_row + head * per_head + tl.minimum(inner, per_head - 1)) * D
        at = at[None, :] + d[:, None]
        q1 = operand(tl.load(q + at, mask=inside, other=0.0), OPERAND)
        q2 = operand(tl.load(q + at + D // 2, mask=inside, other=0.0), OPERAND)
        peak = tl.full((BQ,), NOTHING, tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        mixed1 = tl.zeros((HALF, BQ), tl.float32)
        mixed2 = tl.zeros((HALF, BQ), tl.float32)
        done = True
        if SPREAD:
            done = False
            number = tl.program_id(2)
            if low_piece + number < high_piece:
                begin = (low_piece + number) * PIECE
                peak_b, total_b, mixed1_b, mixed2_b = piece_of(
                    q1, q2, cells, k_norm, frequencies, pages, rings, head, sequence, position,
                    tl.maximum(begin, low // KEYS * KEYS), tl.minimum(begin + PIECE, high),
                    window, scale, num_cells, stride, most_pages,
                    KEYS, BQ, KV_HEADS, KINDS, D, HALF, SLIDING, CELL, OPERAND,
                )  # fmt: skip
                size: tl.constexpr = 2 * HALF * BQ + 2 * BQ
                ticket = tile * KV_HEADS + head
                mine = partial + ticket.to(tl.int64) * most_pieces * size
                here = mine + number * size
                cell = d[:, None] * BQ + column[None, :]
                tl.store(here + cell, mixed1_b, cache_modifier=".cg")
                tl.store(here + HALF * BQ + cell, mixed2_b, cache_modifier=".cg")
                tl.store(here + 2 * HALF * BQ + column, peak_b, cache_modifier=".cg")
                tl.store(here + 2 * HALF * BQ + BQ + column, total_b, cache_modifier=".cg")
                tl.debug_barrier()
                taken = tl.atomic_add(tickets + ticket, 1, sem="acq_rel", scope="gpu")
                done = taken == high_piece - low_piece - 1
                if done:
                    tl.debug_barrier()
                    for index in range(high_piece - low_piece):
                        there = mine + index * size
                        mixed1_b = tl.load(there + cell, cache_modifier=".cg")
                        mixed2_b = tl.load(there + HALF * BQ + cell, cache_modifier=".cg")
                        peak_b = tl.load(there + 2 * HALF * BQ + column, cache_modifier=".cg")
                        total_b = tl.load(there + 2 * HALF * BQ + BQ + column, cache_modifier=".cg")
                        peak, total, mixed1, mixed2 = merged(
                            peak, total, mixed1, mixed2, peak_b, total_b, mixed1_b, mixed2_b
                        )
                    tl.store(tickets + ticket, 0)
        else:
            for number in range(low_piece, high_piece):
                begin = number * PIECE
                peak_b, total_b, mixed1_b, mixed2_b = piece_of(
                    q1, q2, cells, k_norm, frequencies, pages, rings, head, sequence, position,
                    tl.maximum(begin, low // KEYS * KEYS), tl.minimum(begin + PIECE, high),
                    window, scale, num_cells, stride, most_pages,
                    KEYS, BQ, KV_HEADS, KINDS, D, HALF, SLIDING, CELL, OPERAND,
                )  # fmt: skip
                peak, total, mixed1, mixed2 = merged(
                    peak, total, mixed1, mixed2, peak_b, total_b, mixed1_b, mixed2_b
                )
        if done:
            mask = live[None, :] & inside
            keep(out, other, at, mixed1 / total[None, :], mask, OPERAND)
            keep(out, other, at + D // 2, mixed2 / total[None, :], mask, OPERAND)
