"""How a stored matrix lies on a card: planes of codes and scales, in tiles, and what they take.

A stored block mixes its scale and its codes in an odd number of bytes (Q4_0: 18), so a card can
load none of it in whole words. Here every field has a plane of its own, cut into tiles of `TILE`
rows by `CHUNK` weights:

    plane[row // TILE][chunk][row % TILE][bytes of the row's chunk]

What a program reads in one step of its loop over the inputs is therefore one contiguous piece of
each plane, 16-byte aligned. Of a chunk of 64 weights:

    nibbles   codes 32 bytes: byte j holds weight j (low) and j + 32 (high)
              scales two of 16 bits, one for each half; of groups of 128, one for two chunks
              zeros a byte beside each scale (schemes with a zero point)
    bytes     codes 64 int8; scales two of 16 bits
    sixes     low nibbles as in `nibbles`; high 16 bytes: bits 2 i of byte j are those of weight
              j + 16 i; scales four int8, one per 16; step one fp16 for four chunks
    fours     codes as in `nibbles`; scales four bytes: of each half, then the minimum of each; step
              two fp16 for four chunks: what scales and what minima are multiplied with
    fives     as fours; high 32 bytes for four chunks: bit k of byte j is that of weight j + 32 k
    plain     64 numbers

Alignment: planes begin at multiples of `ALIGN` bytes; rows are padded to whole tiles and widths to
whole chunks (of 128 or 256 weights where a scale spans as many). Padding has scale zero, so it adds
nothing to a product; it is counted (`Layout.nbytes`) and never unpacked. Pure arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from halfbyte.specs import SCHEMES, Scheme

TILE = 64
CHUNK = 64
ALIGN = 256

Kind = Literal["nibbles", "bytes", "fours", "fives", "sixes", "plain"]
NumberType = Literal["f32", "f16", "bf16", "u8", "i8"]
ITEMSIZE: dict[NumberType, int] = {"f32": 4, "f16": 2, "bf16": 2, "u8": 1, "i8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """One field: `per_row` numbers of a row for every `chunks` chunks."""

    name: str
    number: NumberType
    per_row: int
    chunks: int = 1

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """How the kernels see a scheme. `span`: weights under one scale where that is more than a
    chunk's half."""

    kind: Kind
    planes: tuple[Plane, ...]
    span: int = CHUNK

    @property
    def zeros(self) -> bool:
        """Whether a group has a zero point."""
        return any(plane.name == "zeros" for plane in self.planes)

    @property
    def number(self) -> NumberType:
        """The type of its scales; of plain numbers their own."""
        return next(plane.number for plane in self.planes if plane.number not in ("u8", "i8"))


def _nibbles(scale: NumberType, *, group: int = 32, zero: bool = False) -> Format:
    chunks = max(1, group // CHUNK)
    per_row = max(1, CHUNK // group)
    planes = (
        Plane(name="codes", number="u8", per_row=32),
        Plane(name="scales", number=scale, per_row=per_row, chunks=chunks),
        Plane(name="zeros", number="u8", per_row=per_row, chunks=chunks),
    )
    return Format(kind="nibbles", planes=planes if zero else planes[:2], span=chunks * CHUNK)


def _superblock(kind: Kind, *, scale: NumberType, steps: int, high: Plane | None = None) -> Format:
    """Super-blocks of 256: four chunks share their `steps`."""
    codes = Plane(name="codes", number="u8", per_row=32)
    scales = Plane(name="scales", number=scale, per_row=4)
    step = Plane(name="step", number="f16", per_row=steps, chunks=4)
    planes = (codes, scales, step) if high is None else (codes, high, scales, step)
    return Format(kind=kind, planes=planes, span=256)


def _plain(number: NumberType) -> Format:
    return Format(kind="plain", planes=(Plane(name="codes", number=number, per_row=CHUNK),))


SCALES: dict[str, NumberType] = {"": "bf16", "-f16": "f16"}
FORMATS: dict[str, Format] = {
    "f32": _plain("f32"),
    "f16": _plain("f16"),
    "bf16": _plain("bf16"),
    "q8_0": Format(
        kind="bytes",
        planes=(
            Plane(name="codes", number="i8", per_row=64),
            Plane(name="scales", number="f16", per_row=2),
        ),
    ),
    "q4_0": _nibbles("f16"),
    "q4_k": _superblock("fours", scale="u8", steps=2),
    "q5_k": _superblock(
        "fives", scale="u8", steps=2, high=Plane(name="high", number="u8", per_row=32, chunks=4)
    ),
    "q6_k": _superblock(
        "sixes", scale="i8", steps=1, high=Plane(name="high", number="u8", per_row=16)
    ),
    **{
        f"{kind}-g{group}{suffix}": _nibbles(scale, group=group, zero=kind == "uint4")
        for kind in ("int4", "uint4")
        for group in (32, 128)
        for suffix, scale in SCALES.items()
    },
}
MATRICES = tuple(SCHEMES[name] for name in FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A matrix [rows, width] of one scheme: where its planes lie in one run of bytes."""

    scheme: Scheme
    rows: int
    width: int

    @property
    def format(self) -> Format:
        return FORMATS[self.scheme.name]

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE)

    @property
    def chunks(self) -> int:
        """Chunks of a row, padding included."""
        span = self.format.span
        return -(-self.width // span) * span // CHUNK

    def plane_shape(self, plane: Plane) -> tuple[int, int, int, int]:
        """[tiles, chunks, rows of a tile, numbers]."""
        return self.tiles, self.chunks // plane.chunks, TILE, plane.per_row

    def offsets(self) -> dict[str, int]:
        """Where each plane begins, in bytes."""
        found: dict[str, int] = {}
        at = 0
        for plane in self.format.planes:
            found[plane.name] = at
            at += aligned(prod(self.plane_shape(plane)) * plane.itemsize)
        return found

    @property
    def nbytes(self) -> int:
        """All planes, padding included."""
        return sum(
            aligned(prod(self.plane_shape(plane)) * plane.itemsize) for plane in self.format.planes
        )


def layout_of(scheme: Scheme, shape: Sequence[int]) -> Layout:
    """The layout of a matrix, or of a stack of matrices whose rows follow each other."""
    return Layout(scheme=scheme, rows=prod(shape[:-1]), width=shape[-1])


def packed_bytes(scheme: Scheme, shape: Sequence[int]) -> int:
    """What a stored tensor takes when packed; a vector is f32 as it is."""
    if len(shape) == 1:
        return aligned(4 * shape[0])
    return layout_of(scheme, shape).nbytes


def aligned(size: int) -> int:
    """The size in whole steps of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A stored tensor as the kernels read it. `data` is uint8 on the device (f32 of a vector), None
    where only an outline is wanted."""

    scheme: Scheme
    shape: tuple[int, ...]
    data: Any = None

    @property
    def layout(self) -> Layout:
        return layout_of(self.scheme, self.shape)

    @property
    def width(self) -> int:
        return self.shape[-1]

    @property
    def kernel(self) -> dict[str, Any]:
        """What kernels must know of the layout."""
        found = self.layout.format
        span = 128 if found.kind == "nibbles" and found.span > 64 else 64
        return {"KIND": found.kind, "NUMBER": found.number, "SPAN": span, "ZEROS": found.zeros}
