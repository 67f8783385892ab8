"""A program under way: launches are added, and later ones find what earlier ones left.

What depends on the card is said here as well: how operands are held, and how many outputs and rows
a program computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.kernels.triton.cells import TritonKV
from halfbyte.kernels.triton.layout import Packed
from halfbyte.kernels.triton.program import (
    OPTIONAL,
    Axis,
    Buffer,
    Grid,
    Launch,
    Program,
    Shape,
    Table,
)

# Numbers that a program has where it goes over a row in parts.
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Tiling:
    """Outputs of a tile, by few and by many rows, the most rows of one, and the warps of each;
    tokens of a block when one is chosen; numbers of a tile of attention's queries, and positions of
    one of its keys where heads are long."""

    few: int = 64
    many: int = 128
    rows: int = 128
    few_warps: int = 4
    many_warps: int = 8
    choice: int = 1024
    queries: int = 1 << 14
    long_keys: int = 32

    def cut(self, rows: int) -> tuple[int, int]:
        """Outputs and rows of a tile of a product with so many rows."""
        if rows <= 16:
            return self.few, 16
        height = min(self.rows, rows)
        return (self.many if height > 64 else self.few), height

    def warps(self, height: int) -> dict[str, Any]:
        """The options of a product whose tiles have so many rows."""
        many = height > 64
        return {
            "num_warps": self.many_warps if many else self.few_warps,
            "num_stages": 3 if many else 4,
        }


# The interpreter pays by the operation, not by the number.
INTERPRETED = Tiling(few=4096, many=4096, choice=4096)
# Without bf16 in the matrix units operands are f32, of which a chip of 64 KiB holds half as many.
OLD = Tiling(many=64, rows=64, queries=1 << 13, long_keys=16)
BF16_UNITS = (8, 0)


def tiling_of(capability: tuple[int, int] | None) -> Tiling:
    """The tiles for a card of this compute capability, None for the usual ones."""
    return OLD if capability is not None and capability < BF16_UNITS else Tiling()


class Recording:
    """`operand` is how kernels hold the operands of products (`numbers`)."""

    def __init__(self, operand: str, tiling: Tiling) -> None:
        self.operand = operand
        self.tiling = tiling
        self.program = Program("f32" if operand == "f32" else "bf16")
        self.shared: Launch | None = None  # a product that others of its input may join
        self._rounded: dict[Buffer, Buffer] = {}

    def launch(
        self,
        kernel: str,
        axis: Axis,
        grid: Callable[[Shape], Grid],
        *,
        writes: tuple[str, ...] = ("out", "other"),
        settings: Callable[[Shape], Mapping[str, Any]] | None = None,
        counted: bool = True,
        **arguments: Any,
    ) -> Launch:
        """Adds a launch; `counted` kernels are told how many rows there are."""
        count = {"count": Table("rows" if axis == "rows" else "wanted_count")} if counted else {}
        added = Launch(kernel, axis, grid, arguments | count, writes)
        if settings is not None:
            added.settings = settings
        return self.program.add(added)

    def as_operand(self, x: Buffer) -> Buffer:
        """The numbers as operands: left beside them by what makes them, or by a launch."""
        if self.operand == "f32":
            return x
        if x not in self._rounded:
            rounded = Buffer(x.axis, x.width, "operand", x.size)
            made = self.program.maker(x)
            other = None if made is None else OPTIONAL.get(made[1])
            if made is not None and other in made[0].writes:
                made[0].arguments[other] = rounded
            else:
                self.placed(x, None, x.width, other=rounded)
            self._rounded[x] = rounded
        return self._rounded[x]

    def placed(
        self,
        x: Buffer | Table,
        out: Buffer | None,
        width: int,
        *,
        x_width: Table | None = None,
        x_start: int = 0,
        start: int = 0,
        index: Table | None = None,
        other: Buffer | None = None,
        part: bool = False,
    ) -> Buffer:
        """Rows of x, those at `index` if it is given, in `out` from column `start` on.

        They are `width` numbers from `x_start` on, of rows of `x_width` (None: of `width`).
        """
        target = out or other
        assert target is not None, "rows must go somewhere"
        self.launch(
            "placed",
            target.axis,
            by_block(target.axis, width),
            x=x,
            index=index,
            out=out,
            other=other,
            width=width,
            x_width=width if x_width is None else x_width,
            x_start=x_start,
            out_width=target.width,
            out_start=start,
            PICK=index is not None,
            BLOCK=BLOCK,
            OPERAND=self.operand,
            writes=("out",) if part else ("out", "other"),
        )
        return target

    def seen(self, kv: TritonKV) -> None:
        """Notes that the program reads these cells: its tables must reach all their pages."""
        program, layout = self.program, kv.layout
        if not layout.sliding:
            program.cells = max(program.cells, layout.num_cells)
            program.most_pages = max(program.most_pages, layout.num_cells // layout.stride)


def by_row(axis: Axis, columns: int | None = None) -> Callable[[Shape], Grid]:
    """A program for every row, or for every row and column."""
    return lambda shape: (shape.of(axis),) if columns is None else (shape.of(axis), columns)


def by_block(axis: Axis, width: int) -> Callable[[Shape], Grid]:
    """A program for every row and block of it."""
    return by_row(axis, -(-width // BLOCK))


def shaped(packed: Packed) -> dict[str, Any]:
    """What kernels ask of a stored matrix that they read single weights of."""
    layout = packed.layout
    return {"tiles": layout.tiles, "chunks": layout.chunks, **packed.kernel}
