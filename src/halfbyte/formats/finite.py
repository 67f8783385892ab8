"""Every tensor that leaves a checkpoint is finite: no NaN, no infinity.

One such weight spoils every logit long after it was read, so it is caught where the tensor is
named. Only the exponents are looked at: of every number in f32, f16 and bf16, of the scales in the
block schemes (their integers are finite). The price is one more look at the bytes, some tens of
gigabytes a second.
"""

from __future__ import annotations

from collections.abc import Iterator

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
# Where the scales (and minima) of a block lie: scheme -> (type, byte range).
SCALES: dict[str, tuple[str, int, int]] = {
    "q8_0": ("f16", 0, 2),
    "q4_0": ("f16", 0, 2),
    "q4_1": ("f16", 0, 4),
    "q5_0": ("f16", 0, 2),
    "q5_1": ("f16", 0, 4),
    "iq4_nl": ("f16", 0, 2),
    "q2_k": ("f16", 80, 84),
    "q3_k": ("f16", 108, 110),
    "q4_k": ("f16", 0, 4),
    "q5_k": ("f16", 0, 4),
    "q6_k": ("f16", 208, 210),
    "iq4_xs": ("f16", 0, 2),
} | {
    f"{kind}-g{group}{suffix}": (scale, 0, 2)
    for kind in ("int4", "uint4")
    for group in (32, 128)
    for suffix, scale in (("", "bf16"), ("-f16", "f16"))
}
# The same in the bytes of a row before its blocks; a last byte of 0 means all of them.
ROW_SCALES: dict[str, tuple[tuple[str, int, int], ...]] = {
    "nf4": (("f32", 0, 4), ("f32", 8, 0)),
    "int8": (("f32", 0, 4), ("f16", 36, 52)),
}


def check_finite(tensor: QTensor, *, name: str) -> None:
    """Raises `IntegrityError` naming the tensor if a number or a scale in it is NaN or infinite."""
    if any(_is_infinite(kind, numbers) for kind, numbers in _numbers(tensor)):
        raise IntegrityError("holds NaN or infinite weights", where=name)


def _numbers(tensor: QTensor) -> Iterator[tuple[str, np.ndarray]]:
    """The floats of a tensor, each kind as unsigned integers [n, floats]."""
    scheme = tensor.scheme
    if scheme.name in ROW_SCALES:
        for kind, first, last in ROW_SCALES[scheme.name]:
            stop = last or scheme.row_extra(tensor.width)
            yield kind, np.ascontiguousarray(tensor.data[:, first:stop]).view(FLOATS[kind][0])
        return
    kind, first, last = SCALES.get(scheme.name, (scheme.name, 0, scheme.block_bytes))
    unsigned = FLOATS[kind][0]
    size = np.dtype(unsigned).itemsize
    if scheme.block_bytes % size:
        yield kind, np.ascontiguousarray(tensor.blocks[:, first:last]).view(unsigned)
    else:
        yield kind, tensor.blocks.view(unsigned)[:, first // size : last // size]


def _is_infinite(kind: str, numbers: np.ndarray) -> bool:
    _, magnitude, infinite = FLOATS[kind]
    step = max(1, CHUNK // numbers.itemsize)
    return any(
        bool((numbers[start : start + step] & magnitude).max() >= infinite)
        for start in range(0, len(numbers), step)
    )
