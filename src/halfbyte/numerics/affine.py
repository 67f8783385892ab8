"""Groups of four-bit integers under one 16-bit scale: what compressed-tensors, GPTQ and AWQ store.

Functions map f32 [n, group] <-> bytes uint8 [n, block_bytes] on any device; a group is 32 or 128
weights, the scale bf16 or fp16, each as the checkpoint has it.

    int4    scale | group / 2 nibble pairs                 scale * (q - 8)
    uint4   scale | zero uint8 | group / 2 nibble pairs    scale * (q - zero), zero in 0..15

Byte j of the pairs holds weight 2 * j (low) and 2 * j + 1 (high): the int32 words of
`pack-quantized`, byte for byte. Rounding to nearest follows compressed-tensors (the largest
magnitude at 7.5 steps; or the whole range, with 0 in it, at 15), but rounds by the scale as it is
stored. A search keeps the layout and chooses better; a negative scale puts the extremum at -8.

Every scale we choose is a number in fp16 as well, so that the weights are q4_0's or q8_0's.
Sources: compressed_tensors/compressors/pack_quantized, quantization/utils (0.20.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.numerics.packing import read_as, read_nibbles, round_half, write_half, write_nibbles
from halfbyte.numerics.scales import Grid, Scales, around, nearest_on, search, spans

SIGNED = Grid(low=-8, high=7)
LEVELS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Affine:
    """One layout: what type the scale has, and whether a group has a zero point."""

    scale: torch.dtype
    zero: bool

    def decode(self, blocks: Tensor) -> Tensor:
        scale, zero, nibbles = self.parts(blocks)
        return nibbles.float().sub_(zero).mul_(scale)

    def parts(self, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale and zero point f32 [n, 1], nibbles uint8 [n, group]."""
        scale = read_as(blocks[:, :2], self.scale).float()
        zero = blocks[:, 2:3].float() if self.zero else torch.full_like(scale, 8)
        pairs = blocks[:, 2 + self.zero :]
        return scale, zero, torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)

    def encode(self, x: Tensor) -> Tensor:
        if self.zero:
            scales = next(spans(x, LEVELS, self._rounded))
        else:
            scales = SIGNED.scales(self._rounded(x.abs().amax(dim=1, keepdim=True) / 7.5))
        return self.write(nearest_on(x, scales), scales)

    def choose(self, x: Tensor, weights: Tensor | None) -> Scales:
        tried = spans(x, LEVELS, self._rounded) if self.zero else around(x, SIGNED, self._rounded)
        return search(x, tried, self._rounded, weights)

    def storable(self, wished: Tensor, _scales: Scales) -> Tensor:
        return self._rounded(wished)

    def write(self, integers: Tensor, scales: Scales) -> Tensor:
        """The bytes; the zero point is minus the lowest integer."""
        zero = scales.low.neg()
        parts = [self._scale_bytes(scales.step)]
        parts += [zero.to(torch.uint8)] if self.zero else []
        return torch.cat([*parts, _paired((integers + zero).to(torch.uint8))], dim=1)

    def read(self, blocks: Tensor) -> tuple[Tensor, Scales]:
        """The inverse of `write`, with integers in int8."""
        scale, zero, nibbles = self.parts(blocks)
        integers = nibbles.to(torch.int8).sub_(zero.to(torch.int8))
        return integers, Scales(step=scale, low=-zero, high=LEVELS - 1 - zero)

    def to_q8_0(self, blocks: Tensor) -> Tensor:
        """The same weights as q8_0's bytes [groups of 32, 34]."""
        scale, integers = self._in_thirty_twos(blocks)
        return torch.cat([scale, integers.view(torch.uint8)], dim=1)

    def to_q4_0(self, blocks: Tensor) -> Tensor:
        """The same weights as q4_0's bytes [groups of 32, 18]; without a zero point."""
        scale, integers = self._in_thirty_twos(blocks)
        return torch.cat([scale, write_nibbles((integers + 8).view(torch.uint8))], dim=1)

    def _in_thirty_twos(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """fp16 bytes [n, 2] and int8 [n, 32]; refuses a bf16 scale that fp16 does not have."""
        scale, zero, nibbles = self.parts(blocks)
        if not torch.equal(round_half(scale), scale):
            raise UnsupportedError("holds a bf16 scale that is no number in fp16")
        integers = nibbles.to(torch.int8).sub_(zero.to(torch.int8)).view(-1, 32)
        return write_half(scale).repeat_interleave(len(integers) // len(scale), dim=0), integers

    def _rounded(self, wished: Tensor) -> Tensor:
        return round_half(wished.to(self.scale))

    def _scale_bytes(self, scale: Tensor) -> Tensor:
        if self.scale == torch.float16:
            return write_half(scale)
        return scale.to(self.scale).view(torch.uint8)


def int4_of_q4_0(blocks: Tensor) -> Tensor:
    """q4_0's bytes as those of `int4-g32-f16`."""
    return torch.cat([blocks[:, :2], _paired(read_nibbles(blocks[:, 2:]))], dim=1)


def _paired(nibbles: Tensor) -> Tensor:
    """uint8 [n, group] below 16 -> [n, group / 2]: neighbours in a byte, the first one low."""
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


# By the names of `specs.scheme`.
AFFINE = {
    f"{kind}-g{group}{suffix}": Affine(scale=scale, zero=kind == "uint4")
    for kind in ("int4", "uint4")
    for group in (32, 128)
    for suffix, scale in (("", torch.bfloat16), ("-f16", torch.float16))
}
