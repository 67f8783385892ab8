"""What is done to rows one by one: norms, residuals, gates, selection. One program has a row (or a
part of it that nothing outside is needed for), so a row's result cannot depend on another.

Every kernel can leave its result as f32, as operands of products, or both (`numbers.keep`).
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

from halfbyte.kernels.triton.numbers import activated, keep


@triton.jit
def normal(x, inside, weight, at, width, eps):
    """`x / sqrt(mean(x^2) + eps) * weight`; weight may be None."""
    scaled = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps))
    if weight is not None:
        scaled = scaled * tl.load(weight + at, mask=inside, other=0.0)
    return scaled


@triton.jit
def normed(x, weight, out, other, count, width, eps, BLOCK: tl.constexpr, OPERAND: tl.constexpr):
    """The RMS norm of every row. Grid: rows."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.arange(0, BLOCK)
        inside = at < width
        start = row.to(tl.int64) * width
        values = tl.load(x + start + at, mask=inside, other=0.0)
        keep(
            out, other, start + at, normal(values, inside, weight, at, width, eps), inside, OPERAND
        )


@triton.jit
def joined(
    x,
    update,
    norm,
    scalar,
    out,
    other,
    then_norm,
    then_out,
    then_other,
    count,
    width,
    eps,
    then_eps,
    NORMED: tl.constexpr,
    THEN: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """(x + update) * scalar, the update normed if `NORMED`; with `THEN`, that normed as well.

    Grid: rows.
    """
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.arange(0, BLOCK)
        inside = at < width
        start = row.to(tl.int64) * width
        added = tl.load(update + start + at, mask=inside, other=0.0)
        if NORMED:
            added = normal(added, inside, norm, at, width, eps)
        values = tl.load(x + start + at, mask=inside, other=0.0) + added
        if scalar is not None:
            values = values * tl.load(scalar)
        keep(out, other, start + at, values, inside, OPERAND)
        if THEN:
            again = normal(values, inside, then_norm, at, width, then_eps)
            keep(then_out, then_other, start + at, again, inside, OPERAND)


@triton.jit
def gated_by(
    x,
    by,
    out,
    other,
    count,
    width,
    by_width,
    by_start,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """activation(x) * by[:, by_start : by_start + width]. Grid: rows, blocks."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        start = row.to(tl.int64) * width
        values = activated(tl.load(x + start + at, mask=inside, other=0.0), ACTIVATION)
        values = values * tl.load(
            by + row.to(tl.int64) * by_width + by_start + at, mask=inside, other=0.0
        )
        keep(out, other, start + at, values, inside, OPERAND)


@triton.jit
def layer_inputs(
    tokens,
    context,
    norm,
    out,
    other,
    count,
    layers,
    width,
    eps,
    scale,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """(tokens + norm(context * scale)) / sqrt(2), normed over a layer's own. Grid: rows, layers."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.arange(0, BLOCK)
        inside = at < width
        start = (row.to(tl.int64) * layers + tl.program_id(1)) * width
        values = tl.load(context + start + at, mask=inside, other=0.0) * scale
        values = normal(values, inside, norm, at, width, eps)
        values = (
            values + tl.load(tokens + start + at, mask=inside, other=0.0)
        ) * 0.7071067811865476
        keep(out, other, start + at, values, inside, OPERAND)


@triton.jit
def placed(
    x,
    index,
    out,
    other,
    count,
    width,
    x_width,
    x_start,
    out_width,
    out_start,
    PICK: tl.constexpr,
    BLOCK: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """out[r, out_start :] = x[index[r], x_start :], or of x[r] without `PICK`; `width` numbers.

    Grid: rows of out, blocks.
    """
    row = tl.program_id(0)
    if row < tl.load(count):
        source = tl.load(index + row) if PICK else row
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        from_ = x + source.to(tl.int64) * x_width + x_start
        values = tl.load(from_ + at, mask=inside, other=0.0)
        keep(out, other, row.to(tl.int64) * out_width + out_start + at, values, inside, OPERAND)


@triton.jit
def filled(out, count, width, value, BLOCK: tl.constexpr):
    """out [R, width] = value. Grid: rows, blocks."""
    row = tl.program_id(0)
    if row < tl.load(count):
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(
            out + row.to(tl.int64) * width + at,
            tl.full((BLOCK,), value, tl.float32),
            mask=at < width,
        )
