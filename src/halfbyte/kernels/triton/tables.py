"""What differs from step to step, as int32 tables that the kernels read: which rows there are,
where their cells lie, how their tokens are drawn. All of them lie in one run of memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.contract import Draw, Rows
from halfbyte.kernels.triton.drawing import MOST_BANNED
from halfbyte.kernels.triton.layout import ALIGN
from halfbyte.kernels.triton.program import Program, Shape, Table, tiles_for
from halfbyte.specs import SamplingParams

Key = tuple[str, int]  # a table's name, and the rows of its tiles where it has any
Values = dict[Key, NDArray[np.int32] | Sequence[int]]
NO_ADAPTER = -1
DRAW_WORDS = 16


def drawable(given: SamplingParams) -> bool:
    """Whether the kernels know all of it: nothing that depends on the tokens before."""
    penalties = given.presence_penalty, given.frequency_penalty, given.repetition_penalty - 1
    return not any(penalties) and not given.bias and len(given.suppress) <= MOST_BANNED


def slices_of(program: Program, shape: Shape) -> tuple[dict[Key, slice], int]:
    """Where each table lies, aligned like buffers, and the numbers of all."""
    sizes: dict[Key, int] = {
        ("rows", 0): 1,
        ("wanted_count", 0): 1,
        ("ids", 0): shape.rows,
        ("positions", 0): shape.rows,
        ("sequences", 0): shape.rows,
        ("adapters", 0): shape.rows,
        ("wanted", 0): shape.wanted,
        ("rings", 0): shape.spans,
        ("pages", 0): shape.spans * program.most_pages,
        ("draws", 0): shape.wanted * DRAW_WORDS,
        ("banned", 0): shape.wanted * MOST_BANNED,
    }
    for launch in program.launches:
        for value in launch.settings(shape).values():
            if isinstance(value, Table):
                sizes[value.name, value.tile] = tiles_for(shape, value.tile)
    found: dict[Key, slice] = {}
    at, step = 0, ALIGN // 4
    for key, size in sizes.items():
        found[key] = slice(at, at + size)
        at += -(-max(size, 1) // step) * step
    return found, at


def values_of(
    rows: Rows, wanted: Sequence[int], most_pages: int, slices: Mapping[Key, slice]
) -> Values:
    """What a step writes into its tables."""
    spans = rows.spans
    counts = [span.count for span in spans]
    positions = [np.arange(span.start, span.start + span.count, dtype=np.int32) for span in spans]
    adapters = [NO_ADAPTER if span.adapter is None else span.adapter for span in spans]
    pages = np.zeros((len(spans), most_pages), np.int32)
    for row, span in zip(pages, spans, strict=True):
        row[: len(span.pages)] = span.pages[:most_pages]
    values: Values = {
        ("rows", 0): [len(rows.token_ids)],
        ("wanted_count", 0): [len(wanted)],
        ("ids", 0): np.asarray(rows.token_ids, np.int32),
        ("positions", 0): np.concatenate(positions),
        ("sequences", 0): np.repeat(np.arange(len(spans), dtype=np.int32), counts),
        ("adapters", 0): np.repeat(np.array(adapters, np.int32), counts),
        ("wanted", 0): np.asarray(wanted, np.int32),
        ("rings", 0): [span.ring for span in spans],
        ("pages", 0): pages.reshape(-1),
    }
    for (name, tile), place in slices.items():
        if name == "tile_first":
            tiles = [*_tiles(counts, tile)]
            empty = [0] * (place.stop - place.start - len(tiles))
            values["tile_first", tile] = [first for first, _ in tiles] + empty
            values["tile_count", tile] = [count for _, count in tiles] + empty
    return values


def _tiles(counts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """The first row and the rows of every tile: of one span each, and of so many rows at most."""
    start = 0
    for count in counts:
        for first in range(0, count, most):
            yield start + first, min(most, count - first)
        start += count


def draws_of(draws: Sequence[Draw]) -> Values:
    """How the token of each row is drawn, as the kernels read it (`choosing`)."""
    words = np.zeros((len(draws), DRAW_WORDS), np.uint32)
    banned = np.zeros((len(draws), MOST_BANNED), np.int32)
    for row, out, draw in zip(words, banned, draws, strict=True):
        given = draw.sampling
        row[:2] = given.top_k, draw.position
        row[2:6] = np.array([given.seed, draw.sequence], np.uint64).view(np.uint32)
        numbers = np.array([given.temperature, given.top_p, given.min_p], np.float64)
        row[6:12] = numbers.view(np.uint32)
        row[13] = len(given.suppress)
        out[: len(given.suppress)] = sorted(given.suppress)
    return {("draws", 0): words.view(np.int32).reshape(-1), ("banned", 0): banned.reshape(-1)}
