"""The super-block schemes of 256 weights: q6_k, and for decoding only q2_k to q5_k, iq4_xs.

A super-block has fp16 super-scales and small integers that scale its sub-blocks, so a sub-block's
scale costs 8 bits and not 16. Functions map f32 [n, 256] <-> bytes uint8 [n, block_bytes] on any
device. Decoding agrees with the `gguf` package bit for bit.

    q2_k   16 nibble pairs of scale and minimum | 64 bytes of bit pairs | d, dmin fp16
           sub-blocks of 16:  (d * scale) * q - (dmin * minimum)
    q3_k   32 bytes of high bits | 64 bytes of bit pairs | 16 scales of 6 bits | d fp16
           sub-blocks of 16:  (d * (scale - 32)) * (q - 4)
    q4_k   d, dmin fp16 | 8 scales and 8 minima of 6 bits | 128 nibble pairs
           sub-blocks of 32:  (d * scale) * q - (dmin * minimum)
    q5_k   as q4_k, with 32 bytes of high bits before the pairs
    q6_k   128 bytes of low nibbles | 64 bytes of high bit pairs | 16 int8 scales | d fp16
           sub-blocks of 16:  (d * scale) * (q - 32)
    iq4_xs d fp16 | 8 scales of 6 bits: bit pairs, then nibbles | 128 nibble pairs
           sub-blocks of 32:  (d * (scale - 32)) * LEVELS[q]

The q6_k encoder is our own. The super-scale comes first, from the largest plain scale of the
sub-blocks; then every sub-block takes the best of some candidates, each already rounded to the
8-bit grid; then the integers are rounded against the product as it is stored. Rounding to nearest
tries five candidates, a search two dozen: 4 and 8 % less squared error than ggml's own.
Source of the layouts: ggml-quants.c.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from halfbyte.numerics.blocks import levels
from halfbyte.numerics.packing import (
    read_bits,
    read_half,
    read_nibbles,
    read_pairs,
    read_six_bits,
    round_half,
    write_half,
    write_nibbles,
)
from halfbyte.numerics.scales import (
    COARSE,
    Grid,
    Scales,
    around,
    glance,
    nearest,
    nearest_on,
    search,
    signed_extremum,
)

Q6_GRID = Grid(low=-32, high=31)
SCALE_GRID = Grid(low=-128, high=127)
HEADROOM = 1.05  # lets the search widen the largest scale of a super-block, too


def decode_q2_k(blocks: Tensor) -> Tensor:
    supers = read_half(blocks[:, 80:])
    integers = read_pairs(blocks[:, 16:80].unflatten(1, (2, 32))).view(-1, 16, 16).float()
    scale = (supers[:, :1] * (blocks[:, :16] & 15))[..., None]
    minimum = (supers[:, 1:] * (blocks[:, :16] >> 4))[..., None]
    return integers.mul_(scale).sub_(minimum).flatten(1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    scales, integers = parts_q3_k(blocks)
    scale = scales.float().mul_(read_half(blocks[:, 108:]))[..., None]
    return integers.float().mul_(scale).flatten(1)


def parts_q3_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales int8 [n, 16] in -32..31 and integers int8 [n, 16, 16] in -4..3."""
    scales = read_nibbles(blocks[:, 96:104]) | (read_pairs(blocks[:, 104:108]) << 4)
    low = read_pairs(blocks[:, 32:96].unflatten(1, (2, 32))).flatten(1)
    integers = low | (_high_bits(blocks[:, :32]) << 2)
    return scales.to(torch.int8).sub_(32), integers.to(torch.int8).sub_(4).view(-1, 16, 16)


def decode_q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, read_nibbles(blocks[:, 16:].unflatten(1, (4, 32))).flatten(1))


def decode_q5_k(blocks: Tensor) -> Tensor:
    low = read_nibbles(blocks[:, 48:].unflatten(1, (4, 32))).flatten(1)
    return _with_minima(blocks, low | (_high_bits(blocks[:, 16:48]) << 4))


def _with_minima(blocks: Tensor, integers: Tensor) -> Tensor:
    """Integers [n, 256] with the scales and minima in the first 16 bytes of q4_k and q5_k."""
    supers = read_half(blocks[:, :4])
    scales, minima = read_six_bits(blocks[:, 4:16])
    scale = (supers[:, :1] * scales)[..., None]
    minimum = (supers[:, 1:] * minima)[..., None]
    return integers.view(-1, 8, 32).float().mul_(scale).sub_(minimum).flatten(1)


def _high_bits(field: Tensor) -> Tensor:
    """32 bytes -> uint8 [n, 256] of 0 and 1: bit k of byte j belongs to weight 32 * k + j."""
    return read_bits(field).unflatten(1, (32, 8)).transpose(1, 2).flatten(1)


def decode_q6_k(blocks: Tensor) -> Tensor:
    integers, scales = read_q6_k(blocks)
    return integers.float().view(-1, 16, 16).mul_(scales.step[..., None]).view(-1, 256)


def read_q6_k(blocks: Tensor) -> tuple[Tensor, Scales]:
    unit = read_half(blocks[:, 208:])
    step = blocks[:, 192:208].view(torch.int8).float().mul_(unit)
    # [n, half, quarter, lane]: a half is 128 weights, a quarter 32 of them.
    low = read_nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(-1, (4, 32))
    high = read_pairs(blocks[:, 128:192].unflatten(1, (2, 32))).unflatten(-1, (4, 32))
    integers = (low | (high << 4)).view(torch.int8).sub_(32).view(-1, 256)
    return integers, Q6_GRID.scales(step, unit.repeat(1, 16))


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    low = blocks[:, 4:8, None] >> torch.tensor([0, 4], dtype=torch.uint8, device=blocks.device)
    high = read_pairs(blocks[:, 2:4, None]).flatten(1)  # byte by byte, lowest pair first
    scales = ((low & 15).flatten(1) | (high << 4)).to(torch.int8).sub_(32)
    scale = scales.float().mul_(read_half(blocks[:, :2]))[..., None]
    nibbles = read_nibbles(blocks[:, 8:].unflatten(1, (8, 16)))
    return levels(nibbles).float().mul_(scale).flatten(1)


def encode_q6_k(x: Tensor) -> Tensor:
    parts, unit = x.reshape(-1, 16), _unit_q6_k(x)
    storable = partial(_whole_units, unit=unit.view(-1, 1))
    step = glance(parts, around(parts, Q6_GRID, storable, COARSE)).step
    scales = Q6_GRID.scales(step.view(-1, 16), unit)
    return write_q6_k(nearest_on(x, scales), scales)


def choose_q6_k(x: Tensor, weights: Tensor | None) -> Scales:
    parts, unit = x.reshape(-1, 16), _unit_q6_k(x)
    storable = partial(_whole_units, unit=unit.view(-1, 1))
    shared = None if weights is None else weights.reshape(-1, 16)
    step = search(parts, around(parts, Q6_GRID, storable), storable, shared).step
    return Q6_GRID.scales(step.view(-1, 16), unit)


def write_q6_k(integers: Tensor, scales: Scales) -> Tensor:
    assert scales.unit is not None
    multiples = nearest(scales.step, scales.unit, SCALE_GRID).to(torch.int8)
    return q6_k_of(
        write_half(scales.unit[:, :1]), multiples, integers.to(torch.int8).view(-1, 16, 16)
    )


def storable(wished: Tensor, scales: Scales) -> Tensor:
    """Steps as 8-bit multiples of the super-scale."""
    assert scales.unit is not None
    return _whole_units(wished, scales.unit)


def _unit_q6_k(x: Tensor) -> Tensor:
    """The super-scale of each block as it is stored, for each of its sub-blocks: [n, 16]."""
    plain = signed_extremum(x.reshape(-1, 16)).div_(Q6_GRID.low).view(-1, 16)
    wished = signed_extremum(plain).mul_(HEADROOM / SCALE_GRID.low)
    return round_half(wished).repeat(1, 16)


def _whole_units(wished: Tensor, unit: Tensor) -> Tensor:
    return nearest(wished, unit, SCALE_GRID).mul_(unit)


def q6_k_of(super_scale: Tensor, scales: Tensor, integers: Tensor) -> Tensor:
    """The bytes of: fp16 super-scales [n, 2], scales int8 [n, 16], integers int8 [n, 16, 16]."""
    places = (integers + 32).view(torch.uint8).view(-1, 2, 4, 32)
    return torch.cat([_six_bits(places), scales.view(torch.uint8), super_scale], dim=1)


def _six_bits(integers: Tensor) -> Tensor:
    """uint8 [n, 2, 4, 32] in 0..63 -> 128 bytes of low nibbles and 64 of high bit pairs."""
    low = write_nibbles((integers & 15).flatten(2)).flatten(1)
    high = integers >> 4
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return torch.cat([low, pairs.flatten(1)], dim=1)
