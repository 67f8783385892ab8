"""Fields of a block, as torch tensors: fp16 scales, nibbles and single bits <-> bytes.

Pure functions on uint8 tensors [blocks, bytes] on any device, and nothing about any scheme. Bytes
are little-endian, as in GGUF and on every machine we run on. Source of the orders: ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError


def read_as(field: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [n, m * itemsize] -> numbers [n, m] of that type."""
    return field.reshape(-1).view(dtype).view(len(field), field.shape[1] // dtype.itemsize)


def read_half(field: Tensor) -> Tensor:
    """fp16 bytes [n, 2 * m] -> f32 [n, m], exact."""
    return read_as(field, torch.float16).float()


def write_half(values: Tensor) -> Tensor:
    """f32 [n, m] -> fp16 bytes [n, 2 * m], rounded to nearest even.

    Raises `UnsupportedError` when a finite value would become infinite.
    """
    halves = values.half()
    if not bool(halves.isfinite().all()):
        largest = float(values.abs().max())
        raise UnsupportedError(
            f"{largest:.4g} does not fit fp16, whose largest number is 65504",
            hint="store this tensor as bf16 or f32",
        )
    return halves.view(torch.uint8)


def round_half(values: Tensor) -> Tensor:
    """f32 -> the nearest fp16 values, as f32; infinite where they do not fit."""
    return values.half().float()


def read_nibbles(field: Tensor) -> Tensor:
    """[n, m] bytes -> uint8 [n, 2 * m]: all the low nibbles, then all the high ones."""
    return torch.cat([field & 15, field >> 4], dim=-1)


def write_nibbles(values: Tensor) -> Tensor:
    """uint8 [n, 2 * m] below 16 -> [n, m] bytes; the inverse of `read_nibbles`."""
    low, high = values.chunk(2, dim=-1)
    return (high << 4).bitwise_or_(low)


def read_bits(field: Tensor) -> Tensor:
    """[n, m] bytes -> uint8 [n, 8 * m] of 0 and 1, least significant bit first."""
    places = torch.arange(8, dtype=torch.uint8, device=field.device)
    return ((field[..., None] >> places) & 1).flatten(-2)


def read_pairs(field: Tensor) -> Tensor:
    """[..., m] bytes -> uint8 [..., 4 * m] in 0..3: the lowest pairs first, then the next."""
    places = torch.arange(0, 8, 2, dtype=torch.uint8, device=field.device)[:, None]
    return ((field.unsqueeze(-2) >> places) & 3).flatten(-2)


def read_six_bits(field: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 12] bytes -> two times eight numbers in 0..63, uint8 [..., 8] each.

    The first four of each are the low six bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their top two bits on top of bytes 0-3 and 4-7.
    """
    first, second, low = field.split(4, dim=-1)
    return (
        torch.cat([first & 63, (low & 15) | ((first >> 2) & 48)], dim=-1),
        torch.cat([second & 63, (low >> 4) | ((second >> 2) & 48)], dim=-1),
    )


def write_six_bits(first: Tensor, second: Tensor) -> Tensor:
    """The inverse of `read_six_bits`."""
    low, high = first.chunk(2, dim=-1)
    low2, high2 = second.chunk(2, dim=-1)
    tops = [low | ((high >> 4) << 6), low2 | ((high2 >> 4) << 6)]
    return torch.cat([*tops, (high & 15) | ((high2 & 15) << 4)], dim=-1)
