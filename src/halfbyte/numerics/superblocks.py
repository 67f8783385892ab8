"""The super-block schemes of 256 weights: q4_k (decoding only) and q6_k.

A super-block has fp16 super-scales and small integers that scale its sub-blocks, so a sub-block's
scale costs 8 bits and not 16. Functions map f32 [n, 256] <-> bytes uint8 [n, block_bytes] on any
device. Decoding agrees with the `gguf` package bit for bit.

    q4_k   d, dmin fp16 | 8 scales and 8 minima of 6 bits | 128 nibble pairs
           sub-blocks of 32:  (d * scale) * q - (dmin * minimum)
    q6_k   128 bytes of low nibbles | 64 bytes of high bit pairs | 16 int8 scales | d fp16
           sub-blocks of 16:  (d * scale) * (q - 32)

The q6_k encoder is our own. The super-scale comes first, from the largest plain scale of the
sub-blocks; then every sub-block takes the best of some candidates, each already rounded to the
8-bit grid; then the integers are rounded against the product as it is stored. Rounding to nearest
tries five candidates, a search two dozen: 4 and 8 % less squared error than ggml's own.
Source of the layouts: ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.packing import read_half, read_nibbles, round_half, write_half, write_nibbles
from halfbyte.numerics.scales import Grid, glance, nearest, search, signed_extremum

Q6_GRID = Grid(low=-32, high=31)
SCALE_GRID = Grid(low=-128, high=127)
HEADROOM = 1.05  # lets the search widen the largest scale of a super-block, too


def decode_q4_k(blocks: Tensor) -> Tensor:
    supers = read_half(blocks[:, :4])
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    pairs = blocks[:, 16:].unflatten(1, (4, 32))
    nibbles = read_nibbles(pairs).unflatten(-1, (2, 32)).flatten(1, 2).float()
    scale = (supers[:, :1] * scales)[..., None]
    minimum = (supers[:, 1:] * minima)[..., None]
    return nibbles.mul_(scale).sub_(minimum).flatten(1)


def _six_bit_pairs(field: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes -> 8 scales and 8 minima in 0..63, f32 [n, 8] each.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their top two bits on top of bytes 0-3 and 4-7.
    """
    scale, minimum, low = field.split(4, dim=1)
    scales = torch.cat([scale & 63, (low & 15) | ((scale >> 2) & 48)], dim=1)
    minima = torch.cat([minimum & 63, (low >> 4) | ((minimum >> 2) & 48)], dim=1)
    return scales.float(), minima.float()


def decode_q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(read_half(blocks[:, 208:]))
    # [n, half, quarter, lane]: a half is 128 weights, a quarter 32 of them.
    low = read_nibbles(blocks[:, :128].unflatten(1, (2, 64))).unflatten(-1, (4, 32))
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)[:, None]
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> places) & 3
    integers = (low | (high << 4)).float().sub_(32)
    return integers.view(-1, 16, 16).mul_(scales[..., None]).view(-1, 256)


def encode_q6_k(x: Tensor, by_search: bool, weights: Tensor | None) -> Tensor:
    parts = x.reshape(-1, 16)
    plain = signed_extremum(parts).div_(Q6_GRID.low).view(-1, 16)
    super_scale = signed_extremum(plain).mul_(HEADROOM / SCALE_GRID.low)  # [n, 1]
    stored = round_half(super_scale).repeat_interleave(16, dim=0)

    def storable(scale: Tensor) -> Tensor:
        return nearest(scale, stored, SCALE_GRID).mul_(stored)

    if by_search:
        scale = search(parts, Q6_GRID, storable, None if weights is None else weights.view(-1, 16))
    else:
        scale = glance(parts, Q6_GRID, storable)
    integers = nearest(parts, scale, Q6_GRID).add_(32).to(torch.uint8).view(-1, 2, 4, 32)
    scales = nearest(scale, stored, SCALE_GRID).to(torch.int8).view(-1, 16)
    return torch.cat(
        [_six_bits(integers), scales.view(torch.uint8), write_half(super_scale)], dim=1
    )


def _six_bits(integers: Tensor) -> Tensor:
    """uint8 [n, 2, 4, 32] in 0..63 -> 128 bytes of low nibbles and 64 of high bit pairs."""
    low = write_nibbles((integers & 15).flatten(2)).flatten(1)
    high = integers >> 4
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    return torch.cat([low, pairs.flatten(1)], dim=1)
