"""How choosing tokens is recorded (`choosing` has the kernels): launches behind those of a step,
which run where it is asked for tokens and not for logits.
"""

from __future__ import annotations

from typing import Any

from halfbyte.kernels.triton.program import Buffer, Grid, Launch, Program, Shape, Table, power
from halfbyte.kernels.triton.recording import Tiling

# The digits of a border, and what is summed up for a row when a token is chosen: for each of two
# filters and each digit a number for each value, and the whole.
CHOICE_DIGITS = 13
CHOICE_SUMS = 2 * CHOICE_DIGITS * 16 + 1
# Ids that a request may suppress for its tokens to be chosen on the device.
MOST_BANNED = 64
COUNTING, WEIGHING = 0, 1  # the filters: top-k, top-p


def choose(program: Program, logits: Buffer, tiling: Tiling) -> None:
    """Adds to a program what chooses a token of every row of its logits, and how far the best of
    them is above the next: two words a row."""
    vocab, axis = logits.width, logits.axis
    blocks = -(-vocab // tiling.choice)

    def per_block(number: Any = "f32") -> Buffer:
        return Buffer(axis, blocks, number)

    peaks, peak_places, broken = per_block(), per_block("i32"), per_block("i32")
    seconds = per_block()
    scores, places = per_block("f64"), per_block("i32")
    above = Buffer(axis, CHOICE_SUMS, "i64")
    program.tokens = tokens = Buffer(axis, 2, "i32", output=True)
    count, draws = Table("rows" if axis == "rows" else "wanted_count"), Table("draws")

    def add(kernel: str, writes: tuple[str, ...], by_block: bool, **arguments: Any) -> None:
        def grid(shape: Shape) -> Grid:
            return (shape.of(axis), blocks) if by_block else (shape.of(axis),)

        def settings(_: Shape) -> dict[str, Any]:
            return {"num_warps": tiling.many_warps}

        program.tail.append(
            Launch(kernel, axis, grid, arguments | {"count": count}, writes, settings)
        )

    row = {"logits": logits, "vocab": vocab}
    blocked = {"blocks": blocks, "BLOCK": tiling.choice}
    found = {"peaks": peaks, "above": above, "draws": draws, "BLOCKS": power(blocks)}
    add("banned", (), False, **row, draws=draws, ids=Table("banned"), MOST=MOST_BANNED)
    add(
        "peaked",
        ("peaks", "seconds", "places", "broken", "above"),
        True,
        **row,
        **blocked,
        peaks=peaks,
        seconds=seconds,
        places=peak_places,
        broken=broken,
        above=above,
    )
    for kind, first in ((COUNTING, 0), (WEIGHING, -1)):
        for digit in range(first, CHOICE_DIGITS):
            add("measured", (), True, **row, **blocked, **found, digit=digit, FILTER=kind)
    add(
        "drawn",
        ("scores", "places"),
        True,
        **row,
        **blocked,
        **found,
        scores=scores,
        places=places,
    )
    add(
        "decided",
        ("tokens",),
        False,
        draws=draws,
        peaks=peaks,
        seconds=seconds,
        peak_places=peak_places,
        broken=broken,
        scores=scores,
        places=places,
        tokens=tokens,
        blocks=blocks,
        BLOCKS=power(blocks),
    )
