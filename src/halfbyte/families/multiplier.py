"""Gemma's embedding multiplier: sqrt(width) as the trained model saw it, in bf16.

Every path takes this value, so a directory and its GGUF give the same tokens; llama.cpp computes
the root in f32, which differs in the third digit (61.968 for 62 at a width of 3840).
"""

from __future__ import annotations

import struct
from math import sqrt


def embed_scale_of(width: int) -> float:
    """sqrt(width) rounded to the nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", sqrt(width)))[0]
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
