"""What a calibrated quantizer must know of a scheme: its groups, the steps it can store, its bytes.

Every scheme here means `step * integer` with the integer in [low, high]: one step (and, where the
scheme stores a zero point, one pair of ends) for each group of weights of a row. A quantizer takes
the `Scales` as they are stored, chooses the integers, and has both written: what it judged is what
ships.

What it is not: a choice of integers. Those of a plain search are the nearest (`scales.nearest_on`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from halfbyte.errors import UnsupportedError
from halfbyte.numerics import blocks, superblocks
from halfbyte.numerics.affine import AFFINE
from halfbyte.numerics.scales import Scales
from halfbyte.specs import SCHEMES, Scheme


class BlockGrid(NamedTuple):
    """The grid of a scheme.

    `choose`: (x [n, block], weights of its error [n, block] or None) -> the scales of least error.
    `storable`: (wished steps, scales) -> the nearest steps that can take their place.
    `write`: (integers [n, block], scales) -> bytes [n, block_bytes].
    `read`: the inverse of it, with integers in int8.
    """

    group: int
    choose: Callable[[Tensor, Tensor | None], Scales]
    storable: Callable[[Tensor, Scales], Tensor]
    write: Callable[[Tensor, Scales], Tensor]
    read: Callable[[Tensor], tuple[Tensor, Scales]]


GRIDS: dict[str, BlockGrid] = {
    "q8_0": BlockGrid(32, blocks.choose_q8_0, blocks.storable, blocks.write_q8_0, blocks.read_q8_0),
    "q4_0": BlockGrid(32, blocks.choose_q4_0, blocks.storable, blocks.write_q4_0, blocks.read_q4_0),
    "q6_k": BlockGrid(
        16,
        superblocks.choose_q6_k,
        superblocks.storable,
        superblocks.write_q6_k,
        superblocks.read_q6_k,
    ),
} | {
    name: BlockGrid(SCHEMES[name].block, layout.choose, layout.storable, layout.write, layout.read)
    for name, layout in AFFINE.items()
}


def grid_of(scheme: Scheme) -> BlockGrid:
    """The grid of a scheme; `UnsupportedError` where it has none that we write."""
    if scheme.name not in GRIDS:
        raise UnsupportedError(
            f"{scheme.name} has no integers to choose", hint=f"one of {', '.join(GRIDS)}"
        )
    return GRIDS[scheme.name]
