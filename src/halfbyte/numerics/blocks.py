"""The schemes of 32 weights: q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl. fp16 scales (and minima).

Functions map f32 [n, 32] <-> bytes uint8 [n, block_bytes] on any device, block by block. Decoding
and rounding to nearest agree with the `gguf` package bit for bit, including its
quirks: q4_0 rounds with the scale *before* that is rounded to fp16, and halves go up; in q8_0 they
go away from zero. A search keeps the format and chooses a better scale (`scales`).

    q8_0   d fp16 | 32 int8                             d * q
    q4_0   d fp16 | 16 nibble pairs                     d * (q - 8)
    q4_1   d fp16 | m fp16 | 16 nibble pairs            d * q + m
    q5_0   d fp16 | 32 fifth bits | 16 nibble pairs     d * (q - 16)
    q5_1   d fp16 | m fp16 | 32 fifth bits | 16 pairs   d * q + m
    iq4_nl d fp16 | 16 nibble pairs                     d * LEVELS[q]

Byte j of the pairs holds weight j (low) and weight j + 16 (high). Source: ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.packing import (
    read_bits,
    read_half,
    read_nibbles,
    round_half,
    write_half,
    write_nibbles,
)
from halfbyte.numerics.scales import Grid, Scales, around, inverse, search, signed_extremum

Q4_GRID = Grid(low=-8, high=7)
Q8_GRID = Grid(low=-127, high=127)
# Denser around 0, as weights are. Of iq4_nl and iq4_xs.
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode_q8_0(blocks: Tensor) -> Tensor:
    return _scaled(blocks[:, 2:].view(torch.int8), blocks)


def encode_q8_0(x: Tensor) -> Tensor:
    scale = signed_extremum(x).abs_().div_(127)
    return _q8_0_of(_round_half_away(x * inverse(scale)), scale)


def choose_q8_0(x: Tensor, weights: Tensor | None) -> Scales:
    return search(x, around(x, Q8_GRID, round_half), round_half, weights)


def write_q8_0(integers: Tensor, scales: Scales) -> Tensor:
    return _q8_0_of(integers, scales.step)


def read_q8_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return blocks[:, 2:].view(torch.int8), Q8_GRID.scales(read_half(blocks[:, :2]))


def _q8_0_of(integers: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([write_half(scale), integers.to(torch.int8).view(torch.uint8)], dim=1)


def decode_q4_0(blocks: Tensor) -> Tensor:
    return _scaled(integers_q4_0(blocks), blocks)


def integers_q4_0(blocks: Tensor) -> Tensor:
    """int8 [n, 32] in -8..7."""
    return read_nibbles(blocks[:, 2:]).to(torch.int8).sub_(8)


def encode_q4_0(x: Tensor) -> Tensor:
    scale = signed_extremum(x).div_(-8)
    nibbles = (x * inverse(scale)).add_(8.5)  # in [0.5, 16.5]; the cast below truncates
    return _q4_0_of(nibbles.to(torch.uint8).clamp_(max=15), scale)


def choose_q4_0(x: Tensor, weights: Tensor | None) -> Scales:
    return search(x, around(x, Q4_GRID, round_half), round_half, weights)


def write_q4_0(integers: Tensor, scales: Scales) -> Tensor:
    return _q4_0_of((integers + 8).to(torch.uint8), scales.step)


def read_q4_0(blocks: Tensor) -> tuple[Tensor, Scales]:
    return integers_q4_0(blocks), Q4_GRID.scales(read_half(blocks[:, :2]))


def _q4_0_of(nibbles: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([write_half(scale), write_nibbles(nibbles)], dim=1)


def storable(wished: Tensor, _scales: Scales) -> Tensor:
    """Steps as fp16 holds them."""
    return round_half(wished)


def decode_q4_1(blocks: Tensor) -> Tensor:
    scale, minimum = read_half(blocks[:, :4]).split(1, dim=1)
    return read_nibbles(blocks[:, 4:]).float().mul_(scale).add_(minimum)


def decode_q5_0(blocks: Tensor) -> Tensor:
    return _scaled(integers_q5_0(blocks), blocks)


def integers_q5_0(blocks: Tensor) -> Tensor:
    """int8 [n, 32] in -16..15."""
    return _five_bits(blocks[:, 2:]).to(torch.int8).sub_(16)


def decode_q5_1(blocks: Tensor) -> Tensor:
    scale, minimum = read_half(blocks[:, :4]).split(1, dim=1)
    return _five_bits(blocks[:, 4:]).float().mul_(scale).add_(minimum)


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    return _scaled(integers_iq4_nl(blocks), blocks)


def integers_iq4_nl(blocks: Tensor) -> Tensor:
    """int8 [n, 32], each one of `LEVELS`."""
    return levels(read_nibbles(blocks[:, 2:]))


def levels(nibbles: Tensor) -> Tensor:
    """The number that each nibble stands for: uint8 -> int8, same shape."""
    return torch.tensor(LEVELS, dtype=torch.int8, device=nibbles.device)[nibbles.int()]


def _scaled(integers: Tensor, blocks: Tensor) -> Tensor:
    """int8 [n, 32] times the scale in the first two bytes of each block."""
    return integers.float().mul_(read_half(blocks[:, :2]))


def _five_bits(field: Tensor) -> Tensor:
    """4 bytes of fifth bits and 16 nibble pairs -> uint8 [n, 32] in 0..31."""
    return read_nibbles(field[:, 4:]) | (read_bits(field[:, :4]) << 4)


def _round_half_away(x: Tensor) -> Tensor:
    """Nearest integer, halves away from zero. Adding 0.5 first would round 0.49999997 up."""
    whole = x.trunc()
    return x.sub_(whole).mul_(2).trunc_().add_(whole)
