"""Finding the Q4_0 blocks that floats were made from, so that they become those blocks again.

Some checkpoints hold in bf16, f16 or f32 what is whole multiples of one scale in every block of 32:
they were trained on that lattice, or dequantized from it. Rounding them anew moves 13 to 100 % of
the blocks to another lattice. Here each block's own is found. Its largest weight is 1 to 8 times
the scale, which gives every other integer; each stored number then bounds the scale, and any fp16
number within all bounds gives back every stored number, bit for bit. The simplest of them is taken:
the fewest binary digits, so that a scale that was bf16 is found as it was.

What it is not: a quantizer. Weights that lie on no lattice are left alone. Price: from bf16 the
bounds often hold two or three fp16 numbers, and a scale that was fp16 is known to 5e-4 of its size
(the stored numbers come back all the same); from f16 and f32 it is known exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.packing import write_half, write_nibbles
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Grid, inverse, nearest, signed_extremum
from halfbyte.specs import SCHEMES

Q4_0 = SCHEMES["q4_0"]
GRID = Grid(low=-8, high=7)
WIDTH = Q4_0.block
SAMPLE = 4096  # blocks
TILE = 1 << 13  # blocks
SHARE = 0.999  # of the blocks of a matrix that lies on a lattice
# How far a stored number may be from its multiple, relative to its size: a step of bf16. Hardly one
# in 10^30 blocks of other weights comes that near by chance.
TOLERANCE = 2.0**-7
# Far below the distance between products of fp16 and an integer, far above an error of f32.
HAIR = 2.0**-20
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Blocks by how they were recovered.

    `exact`: every stored number comes back, bit for bit. `near`: the integers are certain, but no
    fp16 scale gives back every number. `searched`: on no lattice; the best one was chosen.
    """

    exact: int = 0
    near: int = 0
    searched: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            exact=self.exact + other.exact,
            near=self.near + other.near,
            searched=self.searched + other.searched,
        )


class _Blocks(NamedTuple):
    """Blocks as multiples of a scale: scales f32 [n, 1] and integers f32 [n, 32].

    `near` [n]: the numbers are those, within the tolerance. `exact` [n]: bit for bit.
    """

    scale: Tensor
    integers: Tensor
    near: Tensor
    exact: Tensor


def is_lattice(q: QTensor) -> bool:
    """Whether a matrix in f32, f16 or bf16 lies on a Q4_0 lattice, judged by 4096 of its blocks."""
    if not q.scheme.is_float or len(q.shape) < 2 or q.width % WIDTH:
        return False
    return _share(_recognised(_sample(q), TYPES[q.scheme.name]).near) >= SHARE


def recover(q: QTensor) -> tuple[QTensor, Counts]:
    """A matrix that `is_lattice` in q4_0, without changing a bit of the blocks that lie on one."""
    dtype = _rounding(q)
    data = np.empty((q.num_rows, Q4_0.row_bytes(q.width)), dtype=np.uint8)
    stored = torch.from_numpy(data).view(-1, Q4_0.block_bytes)
    counts = Counts()
    for start in range(0, len(stored), TILE):
        x = _floats(q, slice(start, start + TILE))
        blocks = _recognised(x, dtype)
        stored[start : start + TILE] = _stored(x, blocks)
        counts += _counted(blocks)
    return QTensor(Q4_0, q.shape, data), counts


def _sample(q: QTensor) -> Tensor:
    """Up to `SAMPLE` blocks, evenly spread, f32 [n, 32]."""
    blocks = q.num_rows * q.width // WIDTH
    return _floats(q, slice(0, None, -(-blocks // SAMPLE)))


def _floats(q: QTensor, blocks: slice) -> Tensor:
    """The blocks of 32 numbers that the slice takes, f32 [n, 32]."""
    stored = np.ascontiguousarray(q.data.reshape(-1, WIDTH * q.scheme.block_bytes)[blocks])
    return decode(QTensor(q.scheme, (len(stored), WIDTH), stored))


def _rounding(q: QTensor) -> torch.dtype:
    """What the lattice was rounded to: the type it is stored in, or one that was there before."""
    x, own = _sample(q), TYPES[q.scheme.name]
    others = [dtype for dtype in TYPES.values() if torch.equal(x.to(dtype).float(), x)]
    exact = (dtype for dtype in (own, *others) if _share(_recognised(x, dtype).exact) >= SHARE)
    return next(exact, own)


def _share(blocks: Tensor) -> float:
    return float(blocks.float().mean())


def _recognised(x: Tensor, dtype: torch.dtype) -> _Blocks:
    """The blocks as multiples of the scale that makes the largest -8, or -7, ... or -1: the first
    by which they are exact, else the first by which they are near."""
    found = _Blocks(
        scale=torch.zeros(len(x), 1),
        integers=torch.zeros_like(x),
        near=torch.zeros(len(x), dtype=torch.bool),
        exact=torch.zeros(len(x), dtype=torch.bool),
    )
    for largest in range(8, 0, -1):
        left = (~found.exact).nonzero().flatten()
        if not len(left):
            break
        tried = _tried(x if len(left) == len(x) else x[left], largest, dtype)
        better = tried.exact | (tried.near & ~found.near[left])
        for field, values in zip(found, tried, strict=True):
            field[left[better]] = values[better]
    return found


def _tried(x: Tensor, largest: int, dtype: torch.dtype) -> _Blocks:
    """The blocks as multiples of the scale that makes the largest number `-largest`."""
    integers = nearest(x, signed_extremum(x) / -largest, GRID)
    fitted = _fitted(x, integers)
    beyond = (x - fitted * integers).abs_().sub_(x.abs(), alpha=TOLERANCE)
    near = beyond.amax(dim=1) <= 0
    if not bool(near.any()):
        return _Blocks(fitted, integers, near, near)
    simplest = _simplest_scale(_sizes(x, integers), dtype)[:, None] * fitted.sign()
    exact = near & _returns(x, simplest * integers, dtype)
    return _Blocks(torch.where(exact[:, None], simplest, fitted), integers, near, exact)


def _fitted(x: Tensor, integers: Tensor) -> Tensor:
    """The fp16 scale next to the one of least squared error, f32 [n, 1]."""
    products = (x * integers).sum(dim=1, keepdim=True)
    return (products * inverse(integers.square().sum(dim=1, keepdim=True))).half().float()


def _returns(x: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Which blocks are those of x once they are rounded to `dtype`. [n]"""
    return weights.to(dtype).float().sub_(x).abs_().amax(dim=1) == 0


def _simplest_scale(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp16 scale of fewest digits that gives back all the sizes, f32 [n]; some other number
    where none does."""
    low, high = _bounds(sizes, dtype)
    first, last = low.half(), high.half()
    first_bits = first.view(torch.int16).int() + (first.float() < low).int()
    last_bits = last.view(torch.int16).int() - (last.float() > high).int()
    return _simplest(first_bits, last_bits).short().view(torch.float16).float()


def _sizes(x: Tensor, integers: Tensor) -> Tensor:
    """What 0, 1, ... 8 times the scale is stored as, without the sign; 0 if unused. f32 [n, 9]"""
    return torch.zeros(len(x), 9).scatter_(1, integers.abs().long(), x.abs())


def _bounds(sizes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Between which magnitudes of the scale every multiple rounds to its stored size. f32 [n] each.

    Halves round to even, so the bounds of an even number are its own.
    """
    low, high, even = sizes, sizes, torch.ones_like(sizes, dtype=torch.bool)
    if dtype != torch.float32:
        bits = sizes.to(dtype).view(torch.int16)
        low, high = ((sizes + (bits + step).view(dtype).float()) / 2 for step in (-1, 1))
        even = bits % 2 == 0
    hair = torch.where(even, HAIR, -HAIR)
    integers, used = torch.arange(9.0), sizes > 0
    low = torch.where(used, low / integers * (1 - hair), 0.0)
    high = torch.where(used, high / integers * (1 + hair), torch.inf)
    return low.amax(dim=1), high.amin(dim=1)


def _simplest(first: Tensor, last: Tensor) -> Tensor:
    """The number in [first, last] with the most zeros at its end; int32, 0 < first <= last."""
    highest = torch.frexp(((first - 1) ^ last).float())[1] - 1  # the place where the two part
    return last & ~((torch.ones_like(last) << highest) - 1)


def _stored(x: Tensor, blocks: _Blocks) -> Tensor:
    """q4_0 bytes [n, 18]; what lies on no lattice is searched for the best one."""
    nibbles = (blocks.integers + 8).to(torch.uint8)
    stored = torch.cat([write_half(blocks.scale), write_nibbles(nibbles)], dim=1)
    others = x[~blocks.near]
    if len(others):
        stored[~blocks.near] = torch.from_numpy(encode(others, Q4_0, method="search").data)
    return stored


def _counted(blocks: _Blocks) -> Counts:
    exact, near = int(blocks.exact.sum()), int(blocks.near.sum())
    return Counts(exact=exact, near=near - exact, searched=len(blocks.near) - near)
