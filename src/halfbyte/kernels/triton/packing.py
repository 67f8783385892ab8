"""Stored bytes <-> planes on a device, bit for bit in both directions.

Every field moves as it is stored; nothing is decoded. The work is done on the device that the
planes are for, some rows at a time, so loading is bound by reading the file and needs little
beside what it keeps. `layout` says where what lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.triton.layout import CHUNK, TILE, Kind, Layout, NumberType
from halfbyte.numerics.packing import (
    read_nibbles,
    read_pairs,
    read_six_bits,
    write_nibbles,
    write_six_bits,
)
from halfbyte.numerics.qtensor import QTensor

TYPES: dict[NumberType, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "u8": torch.uint8,
    "i8": torch.int8,
}
# Weights that are moved at once: their fields take a few bytes each on the way.
AT_ONCE = 1 << 24

Fields = dict[str, Tensor]
"""Plane name -> bytes [rows, chunks (or spans of some), bytes of the row there]."""


def pack(q: QTensor, layout: Layout, room: Tensor) -> None:
    """Writes the planes of a stored matrix into `room`, uint8 [layout.nbytes]."""
    room.zero_()
    planes = views(layout, room)
    split = _CODECS[layout.format.kind].split
    for start, stop in _pieces(layout):
        blocks = torch.from_numpy(np.ascontiguousarray(q.data[start:stop])).to(room.device)
        fields = split(_padded(blocks, layout), layout)
        for name, plane in planes.items():
            part = plane[start // TILE : -(-stop // TILE)]
            rows = functional.pad(fields[name], (0, 0, 0, 0, 0, -(stop - start) % TILE))
            tiles = rows.contiguous().view(part.dtype)
            part.copy_(tiles.view(len(part), TILE, *tiles.shape[1:]).transpose(1, 2))


def unpack(layout: Layout, room: Tensor, shape: tuple[int, ...]) -> QTensor:
    """The stored matrix again, in the shape it had."""
    planes = views(layout, room)
    join = _CODECS[layout.format.kind].join
    parts: list[Tensor] = []
    for start, stop in _pieces(layout):
        fields: Fields = {}
        for name, plane in planes.items():
            rows = plane[start // TILE : -(-stop // TILE)].transpose(1, 2).flatten(0, 1)
            fields[name] = rows[: stop - start].contiguous().view(torch.uint8)
        blocks = join(fields, layout)[:, : layout.width // layout.scheme.block]
        parts.append(blocks.reshape(stop - start, -1).cpu())
    return QTensor(layout.scheme, shape, torch.cat(parts).numpy())


def views(layout: Layout, room: Tensor) -> Fields:
    """The planes in `room` by name, as numbers of their own type."""
    found: Fields = {}
    for plane, offset in zip(layout.format.planes, layout.offsets().values(), strict=True):
        shape = layout.plane_shape(plane)
        numbers = room[offset : offset + prod(shape) * plane.itemsize].view(TYPES[plane.number])
        found[plane.name] = numbers.view(shape)
    return found


def _pieces(layout: Layout) -> Iterator[tuple[int, int]]:
    """Rows [start, stop), whole tiles but for the last."""
    step = max(1, AT_ONCE // (layout.width * TILE)) * TILE
    for start in range(0, layout.rows, step):
        yield start, min(start + step, layout.rows)


def _padded(rows: Tensor, layout: Layout) -> Tensor:
    """[rows, blocks, bytes of a block], with empty blocks up to whole chunks."""
    blocks = rows.view(len(rows), -1, layout.scheme.block_bytes)
    missing = layout.chunks * CHUNK // layout.scheme.block - blocks.shape[1]
    return functional.pad(blocks, (0, 0, 0, missing))


def _split_nibbles(blocks: Tensor, layout: Layout) -> Fields:
    start = 3 if layout.format.zeros else 2
    scale, zero, pairs = blocks[..., :2], blocks[..., 2:start], blocks[..., start:]
    if layout.scheme.name == "q4_0":
        weights = read_nibbles(pairs)
    else:
        weights = torch.stack([pairs & 15, pairs >> 4], dim=-1)
    groups = layout.chunks * CHUNK // layout.format.span
    fields = {
        "codes": write_nibbles(weights.reshape(len(blocks), -1, CHUNK)),
        "scales": scale.reshape(len(blocks), groups, -1),
    }
    return fields | ({"zeros": zero.reshape(len(blocks), groups, -1)} if zero.numel() else {})


def _join_nibbles(fields: Fields, layout: Layout) -> Tensor:
    count = layout.chunks * CHUNK // layout.scheme.block
    rows = len(fields["codes"])
    weights = read_nibbles(fields["codes"]).reshape(rows, count, -1)
    if layout.scheme.name == "q4_0":
        pairs = write_nibbles(weights)
    else:
        pairs = weights[..., ::2] | (weights[..., 1::2] << 4)
    heads = [
        fields[name].reshape(rows, count, -1) for name in ("scales", "zeros") if name in fields
    ]
    return torch.cat([*heads, pairs], dim=-1)


def _split_bytes(blocks: Tensor, layout: Layout) -> Fields:
    shape = (len(blocks), layout.chunks, -1)
    return {"codes": blocks[..., 2:].reshape(shape), "scales": blocks[..., :2].reshape(shape)}


def _join_bytes(fields: Fields, layout: Layout) -> Tensor:
    shape = (len(fields["codes"]), 2 * layout.chunks, -1)
    return torch.cat([fields["scales"].reshape(shape), fields["codes"].reshape(shape)], dim=-1)


def _split_sixes(blocks: Tensor, layout: Layout) -> Fields:
    rows, shape = len(blocks), (len(blocks), layout.chunks, -1)
    low = read_nibbles(blocks[..., :128].unflatten(-1, (2, 64)))
    high = read_pairs(blocks[..., 128:192].unflatten(-1, (2, 32)))
    return {
        "codes": write_nibbles(low.reshape(rows, -1, CHUNK)),
        "high": _write_pairs(high.reshape(rows, -1, CHUNK)),
        "scales": blocks[..., 192:208].reshape(shape),
        "step": blocks[..., 208:],
    }


def _join_sixes(fields: Fields, layout: Layout) -> Tensor:
    halves = (len(fields["codes"]), layout.chunks // 4, 2, 128)
    low = write_nibbles(read_nibbles(fields["codes"]).reshape(halves)).flatten(-2)
    high = _write_pairs(read_pairs(fields["high"]).reshape(halves)).flatten(-2)
    scales = fields["scales"].reshape(*halves[:2], 16)
    return torch.cat([low, high, scales, fields["step"]], dim=-1)


def _split_minima(blocks: Tensor, layout: Layout) -> Fields:
    rows, chunks = len(blocks), layout.chunks
    scales, minima = (it.reshape(rows, chunks, 2) for it in read_six_bits(blocks[..., 4:16]))
    return {
        "codes": blocks[..., -128:].reshape(rows, chunks, 32),
        "high": blocks[..., 16:-128],
        "scales": torch.cat([scales, minima], dim=-1),
        "step": blocks[..., :4],
    }


def _join_minima(fields: Fields, layout: Layout) -> Tensor:
    blocks = (len(fields["codes"]), layout.chunks // 4, -1)
    scales, minima = (it.reshape(blocks) for it in fields["scales"].chunk(2, dim=-1))
    high = [fields["high"]] if "high" in fields else []
    parts = [fields["step"], write_six_bits(scales, minima), *high, fields["codes"].reshape(blocks)]
    return torch.cat(parts, dim=-1)


def _write_pairs(values: Tensor) -> Tensor:
    """[..., 4 * m] below 4 -> [..., m] bytes, the lowest bits first; inverse of `read_pairs`."""
    first, second, third, fourth = values.chunk(4, dim=-1)
    return first | (second << 2) | (third << 4) | (fourth << 6)


def _split_plain(blocks: Tensor, layout: Layout) -> Fields:
    return {"codes": blocks.reshape(len(blocks), layout.chunks, -1)}


def _join_plain(fields: Fields, layout: Layout) -> Tensor:
    return fields["codes"].reshape(len(fields["codes"]), -1, layout.scheme.block_bytes)


@dataclass(frozen=True, slots=True)
class _Codec:
    """blocks [rows, blocks, bytes] of whole chunks <-> fields."""

    split: Callable[[Tensor, Layout], Fields]
    join: Callable[[Fields, Layout], Tensor]


_CODECS: dict[Kind, _Codec] = {
    "nibbles": _Codec(_split_nibbles, _join_nibbles),
    "bytes": _Codec(_split_bytes, _join_bytes),
    "fours": _Codec(_split_minima, _join_minima),
    "fives": _Codec(_split_minima, _join_minima),
    "sixes": _Codec(_split_sixes, _join_sixes),
    "plain": _Codec(_split_plain, _join_plain),
}
