"""Whether a text goes in circles: its last ids are one short run, over and over, exactly.

What it is not: a judge of style. Tables, rows of dashes and long lists of zeros repeat too, so a
circle counts only when it has gone on for `SPAN` ids, and it is looked for every `EVERY` ids.
"""

from __future__ import annotations

from collections.abc import Sequence

SPAN = 512
LONGEST = 128  # a run that is repeated
EVERY = 32


def circling(ids: Sequence[int], span: int = SPAN) -> bool:
    """Whether the last `span` ids repeat a run of at most `LONGEST`, or of a quarter of `span`."""
    if len(ids) < span or len(ids) % EVERY:
        return False
    tail = ids[-span:]
    longest = min(LONGEST, span // 4)
    return any(tail[run:] == tail[:-run] for run in range(1, longest + 1))
