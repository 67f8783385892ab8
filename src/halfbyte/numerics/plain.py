"""f32, f16 and bf16: blocks of one weight. Encoding rounds to nearest even; decoding is exact.

Functions map f32 [n, 1] <-> bytes uint8 [n, 2 or 4] on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.numerics.packing import read_half, write_half


def decode_f32(blocks: Tensor) -> Tensor:
    return blocks.view(torch.float32)


def encode_f32(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


def decode_f16(blocks: Tensor) -> Tensor:
    return read_half(blocks)


def encode_f16(x: Tensor) -> Tensor:
    return write_half(x)


def decode_bf16(blocks: Tensor) -> Tensor:
    return blocks.view(torch.bfloat16).float()


def encode_bf16(x: Tensor) -> Tensor:
    rounded = x.bfloat16()
    if not bool(rounded.isfinite().all()):
        raise UnsupportedError(
            f"{float(x.abs().max()):.6g} does not fit bf16", hint="store this tensor as f32"
        )
    return rounded.view(torch.uint8)
