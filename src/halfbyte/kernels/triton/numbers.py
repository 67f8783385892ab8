"""What kernels share: operands, stored weights as numbers, activations. Triton functions, inlined.

Products take operands in bf16 and add up in f32. `OPERAND` says how an operand is held:

    "bf16"        in bf16, for the matrix units
    "bf16-f32"    rounded to bf16 and held in f32: Triton's interpreter multiplies no bf16, and
                  truncates where it should round to nearest even
    "f32"         as it is: products are exact to f32

A stored weight is decoded to f32, where code times scale is exact, and rounded once as an operand.
Kernels are compiled without contraction (`enable_fp_fusion=False`): an expression has one value,
whichever kernel it is written in.
"""
# Kernels are compiled by Triton, not run by Python: their arguments are pointers and tiles.
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false

import triton
import triton.language as tl

TILE = tl.constexpr(64)
CHUNK = tl.constexpr(64)


@triton.jit
def rounded(x, OPERAND: tl.constexpr):
    """f32 numbers as operands."""
    if OPERAND == "bf16":
        return x.to(tl.bfloat16)
    elif OPERAND == "bf16-f32":
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def operand(x, OPERAND: tl.constexpr):
    """Numbers that were kept as operands."""
    if OPERAND == "bf16":
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def dot(a, b, total):
    """`total + a @ b`, in f32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def number(code, OFFSET: tl.constexpr):
    """`code - OFFSET` as f32, of an unsigned code below 2**23.

    A code is put into the mantissa of 2**23: conversions are slow, and there is one per weight.
    """
    mantissa = code.to(tl.uint32) | 0x4B000000
    return mantissa.to(tl.float32, bitcast=True) - (8388608.0 + OFFSET)


@triton.jit
def half_byte(pairs, half: tl.constexpr):
    """128 plus the low or high four bits of bytes, as f32."""
    bits = pairs << (16 - 4 * half)
    return ((bits & 0xF0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def aligned(size):
    """A plane's bytes in whole steps of 256."""
    return (size + 255) // 256 * 256


@triton.jit
def plane(weight, at, NUMBER: tl.constexpr):
    """The plane that begins `at` bytes into a packed weight."""
    if NUMBER == "f32":
        return (weight + at).to(tl.pointer_type(tl.float32))
    elif NUMBER == "f16":
        return (weight + at).to(tl.pointer_type(tl.float16))
    elif NUMBER == "bf16":
        return (weight + at).to(tl.pointer_type(tl.bfloat16))
    elif NUMBER == "i8":
        return (weight + at).to(tl.pointer_type(tl.int8))
    else:
        return weight + at


@triton.jit
def line(rows, chunks, PER_ROW: tl.constexpr):
    """Where rows begin in a plane with `PER_ROW` numbers of a row in each chunk."""
    tile = (rows // TILE).to(tl.int64)
    return tile * chunks * (TILE * PER_ROW) + rows % TILE * PER_ROW


@triton.jit
def planes(weight, tiles, chunks, KIND: tl.constexpr, NUMBER: tl.constexpr, SPAN: tl.constexpr):
    """The planes of a packed weight: codes, scales, and two more that some kinds have."""
    cells = tiles.to(tl.int64) * chunks * TILE
    if KIND == "plain":
        codes = plane(weight, 0, NUMBER)
        return codes, codes, codes, codes
    elif KIND == "bytes":
        scales = plane(weight, aligned(cells * 64), NUMBER)
        return weight, scales, scales, scales
    elif KIND != "nibbles":
        at = aligned(cells * 32)
        high = plane(weight, at, "u8")
        high_bytes: tl.constexpr = 16 if KIND == "sixes" else 8 if KIND == "fives" else 0
        at += aligned(cells * high_bytes)
        scales = plane(weight, at, "i8" if KIND == "sixes" else "u8")
        return weight, scales, high, plane(weight, at + aligned(cells * 4), "f16")
    else:
        at = aligned(cells * 32)
        scales = plane(weight, at, NUMBER)
        per_chunk: tl.constexpr = 2 if SPAN == 64 else 1
        groups = cells * per_chunk * 64 // SPAN
        return weight, scales, plane(weight, at + aligned(groups * 2), "u8"), scales


@triton.jit
def group_line(rows, chunks, SPAN: tl.constexpr):
    """Where the scales of rows begin, and how many of a chunk there are."""
    if SPAN == 64:
        return line(rows, chunks, 2)
    else:
        return line(rows, chunks // 2, 1)


@triton.jit
def group_at(chunk, half, SPAN: tl.constexpr):
    """Where the scale of a half of a chunk is, from where its row begins."""
    if SPAN == 64:
        return chunk * (2 * TILE) + half
    else:
        return chunk // 2 * TILE + half * 0


@triton.jit
def nibble(codes, rows, chunk, place, chunks):
    """Four bits of single weights."""
    pairs = tl.load(codes + line(rows, chunks, 32) + chunk * 2048 + place % 32).to(tl.int32)
    return (pairs >> (place // 32 * 4)) & 15


@triton.jit
def stored(
    weight,
    rows,
    inputs,
    tiles,
    chunks,
    KIND: tl.constexpr,
    NUMBER: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """f32: single weights, of rows and inputs that broadcast to one shape."""
    codes, scales, more, step = planes(weight, tiles, chunks, KIND, NUMBER, SPAN)
    chunk, place = inputs // CHUNK, inputs % CHUNK
    if KIND == "plain":
        return tl.load(codes + line(rows, chunks, 64) + chunk * 4096 + place).to(tl.float32)
    elif KIND == "bytes":
        code = tl.load(codes + line(rows, chunks, 64) + chunk * 4096 + place)
        return number(code ^ 128, 128) * tl.load(
            scales + line(rows, chunks, 2) + chunk * 128 + place // 32
        ).to(tl.float32)
    elif KIND == "sixes":
        low = nibble(codes, rows, chunk, place, chunks)
        bits = tl.load(more + line(rows, chunks, 16) + chunk * 1024 + place % 16).to(tl.int32)
        code = (low | (((bits >> (place // 16 * 2)) & 3) << 4)) - 32
        small = tl.load(scales + line(rows, chunks, 4) + chunk * 256 + place // 16)
        unit = tl.load(step + line(rows, chunks // 4, 1) + chunk // 4 * 64)
        return code.to(tl.float32) * (unit.to(tl.float32) * small.to(tl.float32))
    elif KIND != "nibbles":
        code = nibble(codes, rows, chunk, place, chunks)
        if KIND == "fives":
            at = line(rows, chunks // 4, 32) + chunk // 4 * 2048 + place % 32
            bits = tl.load(more + at).to(tl.int32) >> (chunk % 4 * 2 + place // 32)
            code |= (bits & 1) << 4
        step_at = step + line(rows, chunks // 4, 2) + chunk // 4 * 128
        scale_at = scales + line(rows, chunks, 4) + chunk * 256 + place // 32
        scale = tl.load(step_at).to(tl.float32) * tl.load(scale_at).to(tl.float32)
        minimum = tl.load(step_at + 1).to(tl.float32) * tl.load(scale_at + 2).to(tl.float32)
        return code.to(tl.float32) * scale - minimum
    else:
        code = nibble(codes, rows, chunk, place, chunks)
        at = group_line(rows, chunks, SPAN) + group_at(chunk, place // 32, SPAN)
        if ZEROS:
            code -= tl.load(more + at).to(tl.int32)
        else:
            code -= 8
        return code.to(tl.float32) * tl.load(scales + at).to(tl.float32)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """silu, or gelu in its form with tanh: `x * sigmoid(2 u)` is `x / 2 * (1 + tanh(u))`."""
    if ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * (x * x * x)))


@triton.jit
def capped(x, cap):
    """`cap * tanh(x / cap)`."""
    return cap * (2.0 * sigmoid(2.0 * (x / cap)) - 1.0)


@triton.jit
def keep(out, other, at, values, mask, OPERAND: tl.constexpr):
    """Stores f32 numbers, as operands in `other`, or both; either may be None."""
    if out is not None:
        tl.store(out + at, values, mask=mask)
    if other is not None:
        tl.store(other + at, rounded(values, OPERAND).to(other.dtype.element_ty), mask=mask)
