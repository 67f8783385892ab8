"""Cells of one layer's keys and values, and the rule that finds a position's cell.

Types: f32 and bf16 as they are; q8_0 rotates keys and values per head with an orthonormal Hadamard
matrix (which spreads outlier channels) and stores int8 per 32 with an fp16 scale. The rotation is
its own inverse, so reading rotates back. Cells of values only make the keys as they are read.

`ScratchKV` keeps only the keys of the forward under way and lets gradients through: training and
evaluation of whole sequences need no cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.contract import KVLayout, Rows, Span
from halfbyte.kernels.reference.rope import rotate, rotation

BLOCK = 32


class ReferenceKV:
    """The cells of one layer. Overwrites in place; not for autograd."""

    def __init__(self, layout: KVLayout, device: str, key_norm: Tensor | None = None) -> None:
        if layout.kind == "q8_0" and layout.head_dim % BLOCK:
            raise UnsupportedError(
                f"a q8_0 cache needs a head dim that is a multiple of 32, not {layout.head_dim}",
                hint="use --kv bf16",
            )
        self.layout = layout
        self._device = device
        self._key_norm = key_norm
        kept = 2 if layout.key_rope is None else 1
        cells = (kept, layout.num_cells, layout.kv_heads, layout.head_dim)
        self._scales: Tensor | None = None
        if layout.kind == "q8_0":
            blocks = (*cells[:-1], layout.head_dim // BLOCK)
            self._values = torch.zeros(cells, dtype=torch.int8, device=device)
            self._scales = torch.zeros(blocks, dtype=torch.float16, device=device)
            self._hadamard = hadamard(layout.head_dim).to(device)
        else:
            kind = torch.float32 if layout.kind == "f32" else torch.bfloat16
            self._values = torch.zeros(cells, dtype=kind, device=device)

    @property
    def nbytes(self) -> int:
        scales = 0 if self._scales is None else self._scales.nbytes
        return self._values.nbytes + scales

    def seed(self) -> None:
        """Makes all of it resident, with zeros."""
        self._values.zero_()
        if self._scales is not None:
            self._scales.zero_()

    def copy_ring(self, source: int, target: int) -> None:
        """What the cells of one ring hold, into another ring of a sliding layer."""
        for cells in (self._values, self._scales):
            if cells is not None:
                rings = cells.unflatten(1, (-1, self.layout.stride))
                rings[:, target] = rings[:, source]

    def write(self, rows: Rows, k_RGD: Tensor, v_RGD: Tensor) -> None:
        """Puts the keys and values of all rows into their cells."""
        cells = torch.cat([self._cells(span, span.start, span.count) for span in rows.spans])
        both = torch.stack((k_RGD, v_RGD)).detach()[-len(self._values) :]
        if self._scales is None:
            self._values[:, cells] = both.to(self._values.dtype)
            return
        values, scales = round_q8(both @ self._hadamard)
        self._values[:, cells], self._scales[:, cells] = values, scales

    def read(self, span: Span, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Keys and values [high - low, G, D] f32 of positions `[low, high)`.

        Positions that were never written or are already overwritten give finite nonsense, which
        the caller masks.
        """
        cells = self._cells(span, low, high - low)
        both = self._values[:, cells].to(torch.float32)
        if self._scales is not None:
            scales = self._scales[:, cells].to(torch.float32)
            both = (both.unflatten(-1, (-1, BLOCK)) * scales[..., None]).flatten(-2)
            both = both @ self._hadamard
        return self._keys(both[0], low, high), both[-1]

    def _keys(self, kept_SGD: Tensor, low: int, high: int) -> Tensor:
        """The keys as they are kept, or made of the values of the positions `[low, high)`."""
        rope = self.layout.key_rope
        if rope is None:
            return kept_SGD
        assert self._key_norm is not None, "cells of values only need the norm of the keys"
        positions = torch.arange(low, high, device=self._device)
        return rotate(kept_SGD * self._key_norm, *rotation(positions, rope, self.layout.head_dim))

    def _cells(self, span: Span, start: int, count: int) -> Tensor:
        stride = self.layout.stride
        positions = torch.arange(start, start + count, device=self._device)
        if self.layout.sliding:
            return span.ring * stride + positions % stride
        pages = torch.tensor(list(span.pages) or [0], device=self._device)
        page = (positions // stride).clamp(max=len(pages) - 1)
        return pages[page] * stride + positions % stride


class ScratchKV:
    """Keys and values of the current forward only; every span starts at position 0."""

    def __init__(self) -> None:
        self._spans: dict[int, tuple[Tensor, Tensor]] = {}
        self._all: tuple[Tensor, Tensor] | None = None

    def write(self, rows: Rows, k_RGD: Tensor, v_RGD: Tensor) -> None:
        counts = [span.count for span in rows.spans]
        parts = zip(k_RGD.split(counts), v_RGD.split(counts), strict=True)
        self._spans = {id(span): part for span, part in zip(rows.spans, parts, strict=True)}
        self._all = (k_RGD, v_RGD)

    @property
    def all(self) -> tuple[Tensor, Tensor]:
        """Keys and values [R, G, D] of all rows."""
        assert self._all is not None, "read before anything was written"
        return self._all

    def read(self, span: Span, low: int, high: int) -> tuple[Tensor, Tensor]:
        k, v = self._spans[id(span)]
        missing = (0, 0, 0, 0, 0, max(0, high - span.count))
        return (
            torch.nn.functional.pad(k, missing)[low:high],
            torch.nn.functional.pad(v, missing)[low:high],
        )


def hadamard(size: int) -> Tensor:
    """[size, size] f32: orthonormal and symmetric; blocks of the largest power of two in `size`."""
    block = size & -size
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return torch.block_diag(*[matrix / block**0.5] * (size // block))


def round_q8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and fp16 scales per 32 along the last axis (the rule of Q8_0)."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    scaled = blocks * inverse
    # Halves go away from zero, as roundf does.
    values = torch.trunc(scaled + torch.copysign(torch.full_like(scaled, 0.5), scaled))
    return values.to(torch.int8).flatten(-2), scale.squeeze(-1).to(torch.float16)


def fake_q8(x: Tensor) -> Tensor:
    """`x` rounded to int8 per 32 and back, f32."""
    values, scales = round_q8(x)
    blocks = values.to(torch.float32).unflatten(-1, (-1, BLOCK))
    return (blocks * scales.to(torch.float32)[..., None]).flatten(-2)


KV = ReferenceKV | ScratchKV
