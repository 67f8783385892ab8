"""Every tensor that leaves a checkpoint is finite: no NaN, no infinity.

One such weight spoils every logit long after it was read, so it is caught where the tensor is
named. Only the exponents are looked at: of every number in f32, f16 and bf16, of the scales in the
block schemes (their integers are finite). The price is one more look at the bytes, some tens of
gigabytes a second.
"""

from __future__ import annotations

import numpy as np

from halfbyte.errors import IntegrityError
from halfbyte.numerics.qtensor import QTensor

CHUNK = 1 << 20

# An exponent of ones means NaN or infinity: scheme -> (unsigned type, sign cleared, all ones).
FLOATS: dict[str, tuple[type[np.unsignedinteger], int, int]] = {
    "f32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "f16": (np.uint16, 0x7FFF, 0x7C00),
    "bf16": (np.uint16, 0x7FFF, 0x7F80),
}
# Where the f16 scales (and minima) of a block lie: scheme -> byte range.
SCALES: dict[str, tuple[int, int]] = {
    "q8_0": (0, 2),
    "q4_0": (0, 2),
    "q4_1": (0, 4),
    "q5_0": (0, 2),
    "q5_1": (0, 4),
    "iq4_nl": (0, 2),
    "q2_k": (80, 84),
    "q3_k": (108, 110),
    "q4_k": (0, 4),
    "q5_k": (0, 4),
    "q6_k": (208, 210),
    "iq4_xs": (0, 2),
}


def check_finite(tensor: QTensor, *, name: str) -> None:
    """Raises `IntegrityError` naming the tensor if a number or a scale in it is NaN or infinite."""
    kind = tensor.scheme.name
    first, last = SCALES.get(kind, (0, tensor.scheme.block_bytes))
    unsigned, magnitude, infinite = FLOATS["f16" if kind in SCALES else kind]
    size = np.dtype(unsigned).itemsize
    numbers = tensor.blocks.view(unsigned)[:, first // size : last // size]
    step = CHUNK // tensor.scheme.block_bytes
    for start in range(0, len(numbers), step):
        if (numbers[start : start + step] & magnitude).max() >= infinite:
            raise IntegrityError("holds NaN or infinite weights", where=name)
