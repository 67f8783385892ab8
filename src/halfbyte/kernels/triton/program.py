"""A recorded forward as data: what is launched on which buffers, and what memory it takes.

Recording runs no kernel and imports neither torch nor Triton, so a plan asks the very program that
would run. A program is for any number of rows: sizes and grids are functions of a `Shape`, and a
step is recorded once and laid out for each shape that occurs.

Buffers that are never alive together share memory (first fit, in the order of the launches).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from halfbyte.kernels.triton.layout import ITEMSIZE, NumberType, aligned

WIDE = {"i32": 4, "i64": 8, "f64": 8}
Axis = Literal["rows", "wanted", "fixed"]
Grid = tuple[int, ...]
# Up to so many rows of a step share a pass over the weights and spread sums over programs.
FEW = 16
# Positions of a piece of attention's sum.
PIECE = 512


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is laid out for: up to so many rows, rows with logits, and sequences.

    `cells` are those of a layer that sees everything: no sequence has more positions.
    """

    rows: int
    wanted: int
    spans: int
    cells: int

    @property
    def few(self) -> bool:
        """Whether its rows share one pass over the weights."""
        return self.rows <= FEW

    def of(self, axis: Axis) -> int:
        return {"rows": self.rows, "wanted": self.wanted, "fixed": 1}[axis]


def bucket(rows: int, wanted: int, spans: int, cells: int) -> Shape:
    """The shape that serves a step of this size: powers of two."""
    return Shape(power(rows), power(wanted), power(spans), cells)


def usual(most: Shape) -> list[Shape]:
    """The shapes that a server's steps have again and again: rounds of some sequences, with drafts
    and without, and the largest step."""
    rounds = [
        replace(most, rows=spans * each, wanted=spans * each, spans=spans)
        for spans in _powers(most.spans)
        for each in _powers(max(1, most.wanted // most.spans))
    ]
    return [*rounds, most]


def _powers(most: int) -> Iterator[int]:
    """1, 2, 4 and so on up to a power of two."""
    return (1 << exponent for exponent in range(most.bit_length()))


def tiles_for(shape: Shape, rows: int) -> int:
    """The most tiles of so many rows of one sequence that a step can have."""
    spans = min(shape.spans, shape.rows)
    return min(shape.rows, -(-shape.rows // rows) + max(spans - 1, 0))


def power(count: int) -> int:
    """The next power of two; 0 stays 0."""
    return 0 if count == 0 else 1 << (count - 1).bit_length()


@dataclass(eq=False, slots=True)
class Buffer:
    """Numbers that a launch writes and later ones read: `width` of them for each row of an axis.

    `size` gives the numbers of buffers that are no rows. An `output` outlives every launch.
    """

    axis: Axis
    width: int
    number: NumberType | Literal["i32", "i64", "f64", "operand"] = "f32"
    size: Callable[[Shape], int] | None = None
    output: bool = False

    def numbers(self, shape: Shape) -> int:
        return self.width * shape.of(self.axis) if self.size is None else self.size(shape)

    def nbytes(self, shape: Shape, operand: NumberType) -> int:
        size = WIDE.get(self.number) or ITEMSIZE[self.kind(operand)]
        return aligned(self.numbers(shape) * size)

    def kind(self, operand: NumberType) -> NumberType:
        """The type of its numbers, where it is one that layouts know."""
        if self.number == "operand":
            return operand
        assert self.number in ITEMSIZE, self.number
        return self.number  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class Table:
    """One of the tables that come with every step: which rows there are (`step`)."""

    name: str
    tile: int = 0


@dataclass(frozen=True, slots=True)
class Apart:
    """How far `there` is from `here`, in numbers of `itemsize` bytes, once both have a place."""

    here: Any
    there: Any
    itemsize: int


# Results that a kernel can do without, where it leaves the same as operands.
OPTIONAL = {"out": "other", "then_out": "then_other"}
Setting = Callable[[Shape], Mapping[str, Any]]


@dataclass(eq=False, slots=True)
class Launch:
    """One kernel on buffers. `settings` are the arguments and options that a shape decides.

    `writes` are the names of arguments that are written, buffers under any other name are read;
    `also` are buffers that are written and reached from another one (`Apart`).
    """

    kernel: str
    axis: Axis
    grid: Callable[[Shape], Grid]
    arguments: dict[str, Any]
    writes: tuple[str, ...] = ("out", "other")
    settings: Setting = field(default=lambda _: {})
    also: list[Buffer] = field(default_factory=list[Buffer])

    def written(self) -> Iterator[Buffer]:
        for name in self.writes:
            if isinstance(value := self.arguments.get(name), Buffer):
                yield value
        yield from self.also

    def read(self) -> Iterator[Buffer]:
        for name, value in self.arguments.items():
            if name not in self.writes and isinstance(value, Buffer):
                yield value


@dataclass(frozen=True, slots=True)
class Place:
    """Where a buffer lies in the workspace."""

    offset: int
    nbytes: int


class Program:
    """The launches of one forward, in order, and the buffers that it gives back.

    `cells` and `most_pages` are those of the caches that it reads: what a sequence may have at
    most; `states_width` is that of the states that it is given, 0 for none. A finished program does
    not change. `tail` is what chooses tokens of its logits, where it is asked to; `tokens` is what
    comes of that.
    """

    def __init__(self, operand: NumberType) -> None:
        self.launches: list[Launch] = []
        self.outputs: list[Buffer] = []
        self.tail: list[Launch] = []
        self.tokens: Buffer | None = None
        self.cells = 0
        self.states_width = 0
        self._sizes: dict[Shape, int] = {}
        self.most_pages = 1
        self.operand_type: NumberType = operand

    def add(self, launch: Launch) -> Launch:
        self.launches.append(launch)
        return launch

    def maker(self, buffer: Buffer) -> tuple[Launch, str] | None:
        """The last launch that writes a buffer, and under which name."""
        for launch in reversed(self.launches):
            for name in launch.writes:
                if launch.arguments.get(name) is buffer:
                    return launch, name
            if buffer in launch.also:
                return launch, ""
        return None

    def finish(self, outputs: Sequence[Buffer]) -> None:
        """Says what comes out. What nobody reads is not written."""
        self.outputs = list(outputs)
        for buffer in outputs:
            buffer.output = True
        read = {id(it) for launch in self.launches for it in launch.read()}
        for launch in self.launches:
            for name, other in OPTIONAL.items():
                value = launch.arguments.get(name)
                needed = not isinstance(value, Buffer) or value.output or id(value) in read
                if not needed and launch.arguments.get(other) is not None:
                    launch.arguments[name] = None

    def places(self, shape: Shape) -> tuple[dict[int, Place], int]:
        """Where every buffer lies (by `id`), and what they take together."""
        first, last, known = self._lives
        placed: dict[int, Place] = {}
        alive: list[int] = []
        total = 0
        for key in sorted(first, key=lambda it: first[it]):
            size = known[key].nbytes(shape, self.operand_type)
            alive = [it for it in alive if last[it] >= first[key]]
            offset = _gap(sorted((placed[it].offset, placed[it].nbytes) for it in alive), size)
            placed[key] = Place(offset, size)
            alive.append(key)
            total = max(total, offset + size)
        return placed, total

    def nbytes(self, rows: int, wanted: int, spans: int, cells: int) -> int:
        """What the largest of all steps up to so many rows takes."""
        pieces = -(-cells // PIECE) * PIECE
        most = bucket(max(rows, 1), wanted, spans, pieces)
        few = replace(most, rows=min(FEW, most.rows), spans=min(FEW, most.rows, most.spans))
        # Many rows go through all pieces in one program, however many there are.
        shapes = {few, most if most.few else replace(most, cells=0)}
        for shape in shapes - set(self._sizes):
            self._sizes[shape] = self.places(shape)[1]
        return max(self._sizes[shape] for shape in shapes)

    @cached_property
    def _lives(self) -> tuple[dict[int, int], dict[int, int], dict[int, Buffer]]:
        """The first and the last launch of every buffer."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        known: dict[int, Buffer] = {}
        end = len(self.launches) + len(self.tail)
        for index, launch in enumerate((*self.launches, *self.tail)):
            for buffer in (*launch.written(), *launch.read()):
                key = id(buffer)
                known[key] = buffer
                first.setdefault(key, index)
                last[key] = end if buffer.output else index
        return first, last, known


def _gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The first offset with so much room between what is taken (offset, bytes), ascending."""
    at = 0
    for offset, nbytes in taken:
        if offset - at >= size:
            break
        at = max(at, offset + nbytes)
    return at
