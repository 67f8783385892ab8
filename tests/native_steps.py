"""Small native steps without torch: random stored weights, and products and models of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.contract import Linear, Rows, Span
from halfbyte.kernels.cpu import CPUOps
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES

Floats = NDArray[np.float32]

# Where the f16 scales of a stored block lie: the block's bytes, and the scales' offsets.
BLOCKS = {
    "q8_0": (34, (0,)),
    "q4_0": (18, (0,)),
    "q4_k": (144, (0, 2)),
    "q5_k": (176, (0, 2)),
    "q6_k": (210, (208,)),
}
# What a block's largest product of integers comes to, so that weights are of order one.
LARGEST = {"q8_0": 127, "q4_0": 8, "q4_k": 63 * 15, "q5_k": 63 * 31, "q6_k": 127 * 32}
PLAIN = {"f32": np.float32, "f16": np.float16}


def random_weight(scheme: str, rows: int, width: int, seed: int = 0) -> QTensor:
    """Stored bytes of any value, their scales of either sign; floats of a normal distribution."""
    numbers = np.random.default_rng(seed)
    if scheme not in BLOCKS:
        return plain_weight(scheme, numbers.standard_normal((rows, width), dtype=np.float32))
    size, offsets = BLOCKS[scheme]
    blocks = (rows, width // SCHEMES[scheme].block)
    data = numbers.integers(0, 256, (*blocks, size), dtype=np.uint8)
    for offset in offsets:
        scales = numbers.uniform(0.5, 1, blocks) * numbers.choice((-1, 1), blocks)
        halves = (scales / LARGEST[scheme]).astype(np.float16)
        data[..., offset : offset + 2] = halves[..., None].view(np.uint8)
    return QTensor(SCHEMES[scheme], (rows, width), data.reshape(rows, -1))


def plain_weight(scheme: str, values: Floats) -> QTensor:
    """A weight [rows, width], or a vector, stored as f32, f16 or bf16 (cut off)."""
    if scheme == "bf16":
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        halves = values.astype(PLAIN[scheme])
    rows = halves.reshape(1, -1) if values.ndim == 1 else halves
    data = np.ascontiguousarray(rows).view(np.uint8)
    return QTensor(SCHEMES[scheme], values.shape, data)


def rows_of(
    token_ids: Sequence[int], pages: Sequence[int] = (0,), adapter: int | None = None
) -> Rows:
    """The first rows of one sequence."""
    span = Span(start=0, count=len(token_ids), pages=pages, ring=0, adapter=adapter)
    return Rows(token_ids=token_ids, spans=[span])


class Product:
    """`x @ weight.T` as a step: the rows of x are those of an embedding table in f32."""

    def __init__(self, ops: CPUOps, weight: QTensor, x: Floats) -> None:
        table, packed = ops.pack(plain_weight("f32", x)), ops.pack(weight)

        def graph(rows: Rows, wanted: Sequence[int]) -> Any:
            chosen = ops.select(ops.embed(rows, table, 1.0), wanted)
            return (ops.linear(chosen, Linear(weight=packed)),)

        self._rows = rows_of(range(len(x)))
        self.step = ops.step(graph)

    def __call__(self) -> Floats:
        return np.array(self.step(self._rows, range(len(self._rows.token_ids)))[0])
