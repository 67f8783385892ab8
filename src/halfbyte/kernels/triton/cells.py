"""The cells of one layer: keys and values as the kernels keep them.

They lie by kept kind (keys and values, or values alone), head, cell and dimension; the scales of
q8_0 follow all codes. A page or ring is whole tiles of `TILE` cells, so that a tile of keys is one
run of memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.contract import KVLayout
from halfbyte.kernels.triton.layout import Packed, aligned

TILE = 64


@dataclass(frozen=True, slots=True, eq=False)
class TritonKV:
    """`data` is uint8 on the device, None in an outline; `key_norm` is there where keys are made
    of values."""

    layout: KVLayout
    data: Any = None
    key_norm: Packed | None = None

    @property
    def kinds(self) -> int:
        return kinds_of(self.layout)

    @property
    def nbytes(self) -> int:
        return bytes_of(self.layout)

    def seed(self) -> None:
        """Makes all of it resident, with zeros."""
        self.data.zero_()

    def copy_ring(self, source: int, target: int) -> None:
        """What the cells of one ring hold, into another ring of a sliding layer."""
        layout = self.layout
        heads, at = self.kinds * layout.kv_heads, 0
        for size in _cell_bytes(layout):
            part = self.data[at : at + heads * layout.num_cells * size]
            rings = part.view(heads, -1, layout.stride * size)
            rings[:, target] = rings[:, source]
            at += heads * layout.num_cells * size


def kinds_of(layout: KVLayout) -> int:
    """Two where keys and values are kept, one for values alone."""
    return 2 if layout.key_rope is None else 1


def bytes_of(layout: KVLayout) -> int:
    """What the cells of a layer take."""
    cells = kinds_of(layout) * layout.kv_heads * layout.num_cells
    return aligned(cells * sum(_cell_bytes(layout)))


def check(layout: KVLayout) -> None:
    """Raises `UnsupportedError` for cells that the kernels do not know."""
    if layout.stride % TILE:
        raise UnsupportedError(
            f"pages or rings of {layout.stride} cells; the kernels read {TILE} at a time"
        )
    dim = layout.head_dim
    if layout.kind == "q8_0" and (dim & (dim - 1) or dim < 64):
        raise UnsupportedError(
            f"a q8_0 cache on a GPU needs a head dim of 64, 128, 256 or 512, not {dim}",
            hint="use --kv bf16",
        )


def _cell_bytes(layout: KVLayout) -> tuple[int, ...]:
    """Of one head of one cell: its numbers or codes, and its scales."""
    each = {"f32": 4, "bf16": 2, "q8_0": 1}[layout.kind]
    scales = (layout.head_dim // 32 * 2,) if layout.kind == "q8_0" else ()
    return layout.head_dim * each, *scales
