"""nf4 with double quantization: the four-bit weights of bitsandbytes (QLoRA), bit for bit.

A weight is one of 16 levels, quantiles of a normal distribution, times the largest magnitude of its
block of 64. That is kept in 8 bits: an offset (the mean over the tensor) plus one of 256 levels
times the largest deviation of its span of 256 blocks. Blocks and spans run through the tensor row
after row, so a span may begin in the middle of a row. Here every row keeps all that it needs:

    offset f32 | phase uint32 | outer f32 [spans] | K / 64 blocks: level uint8, 32 nibble pairs
    LEVELS[q] * (DYNAMIC[level] * outer[(phase + block) // 256] + offset)

`phase` is where the row's first block lies in its span; the first weight of a pair is the high
nibble.

What it is not: a grid for calibrated methods. Its levels are a table, and weights go to the
nearest; it is here to be read and compared with.
Source: bitsandbytes 0.50 (functional.py, backends/default).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.packing import read_as

BLOCK, SPAN = 64, 256
TILE = 1 << 14  # blocks at once
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def levels() -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32)


def dynamic_levels() -> Tensor:
    """The 256 levels of the dynamic 8-bit type, f32, ascending.

    Each decade from 1e-7 to 1 is cut into twice as many equal parts as the one below it, of which
    the middles are levels, with either sign; 0 and 1 complete them.
    """
    decades: list[Tensor] = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        decades.append((bounds[:-1] + bounds[1:]) / 2.0 * 10.0 ** (decade - 6))
    magnitudes = torch.cat(decades)
    return torch.cat([-magnitudes, magnitudes, torch.tensor([0.0, 1.0])]).sort().values


def decode_nf4(rows: Tensor, width: int) -> Tensor:
    """Rows of bytes -> f32 [n, width]."""
    blocks = width // BLOCK
    head, body = rows.split([rows.shape[1] - blocks * (1 + BLOCK // 2), blocks * 33], dim=1)
    offset, phase = read_as(head[:, :4], torch.float32), read_as(head[:, 4:8], torch.int32)
    outer = read_as(head[:, 8:], torch.float32)
    span = (phase % SPAN + torch.arange(blocks, device=rows.device)) // SPAN
    body = body.unflatten(1, (blocks, 33))
    dynamic = dynamic_levels().to(rows.device)[body[..., 0].int()]
    largest = dynamic.mul_(outer.gather(1, span)).add_(offset)
    pairs = body[..., 1:]
    nibbles = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(2)
    return levels().to(rows.device)[nibbles.int()].mul_(largest[..., None]).flatten(1)


def encode_nf4(weight: Tensor, _importance: Tensor | None) -> Tensor:
    """f32 [N, K] -> rows of bytes, rounded to nearest."""
    blocks = weight.reshape(-1, BLOCK)
    largest = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=1)
    pairs = torch.cat([_pairs(blocks[i : i + TILE]) for i in range(0, len(blocks), TILE)])
    offset = largest.mean()
    deviations, outer = _quantized_deviations(largest - offset)
    return rows_of(pairs.view(len(weight), -1), deviations, outer, offset)


def rows_of(pairs: Tensor, levels_of_blocks: Tensor, outer: Tensor, offset: Tensor) -> Tensor:
    """The rows [N, row bytes] of the tensors that bitsandbytes stores.

    `pairs` uint8 [N, K / 2], `levels_of_blocks` uint8 [N * K / 64], `outer` f32, one for each span
    of 256 blocks, `offset` one f32. K is a multiple of 64.
    """
    rows, blocks = len(pairs), 2 * pairs.shape[1] // BLOCK
    first = torch.arange(rows, device=pairs.device) * blocks
    spans = torch.arange(1 + -(-(blocks - 1) // SPAN), device=pairs.device)
    touched = outer[(first[:, None] // SPAN + spans).clamp_(max=len(outer) - 1)]
    head = [offset.float().reshape(1, 1).expand(rows, 1).contiguous().view(torch.uint8)]
    head += [(first % SPAN).int()[:, None].view(torch.uint8), touched.view(torch.uint8)]
    body = torch.cat(
        [levels_of_blocks.view(rows, blocks, 1), pairs.view(rows, blocks, BLOCK // 2)], dim=2
    )
    return torch.cat([*head, body.flatten(1)], dim=1)


def _pairs(blocks: Tensor) -> Tensor:
    """f32 [n, 64] -> uint8 [n, 32] pairs of the nearest levels."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    found = _nearest(blocks, largest, levels().to(blocks.device))
    return (found[:, ::2] << 4) | found[:, 1::2]


def _quantized_deviations(deviations: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 levels of `dynamic_levels` and the largest magnitude of each span."""
    spans = torch.nn.functional.pad(deviations, (0, -len(deviations) % SPAN)).view(-1, SPAN)
    outer = spans.abs().amax(dim=1, keepdim=True)
    found = _nearest(spans, outer, dynamic_levels().to(deviations.device))
    return found.flatten()[: len(deviations)], outer.flatten()


def _nearest(x: Tensor, largest: Tensor, ascending: Tensor) -> Tensor:
    bounds = (ascending[:-1] + ascending[1:]) / 2
    scaled = (x * largest.clamp(min=1e-38).reciprocal()).clamp_(-1, 1)
    return torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
