"""The only place that knows how a forward is executed: scheduled integers in, chosen tokens out.

A step commits a *list* of tokens per sequence: none while a prompt is still being computed, one
when decoding. Whatever chooses more of them in one forward belongs here, and nothing above changes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.sampling import sample
from halfbyte.engine.scheduler import Work
from halfbyte.engine.sequence import Sequence
from halfbyte.models.cache import Cache
from halfbyte.models.decoder import Chunk, Decoder


class Runner:
    """A decoder and the cache it works in."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self._decoder = decoder
        self._cache = cache

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    def run(self, work: list[Work]) -> list[list[int]]:
        """One forward; the tokens chosen for each item, in order. Slots have advanced."""
        chunks = [_chunk(item) for item in work]
        logits = iter(self._decoder.forward(chunks, self._cache))
        return [
            [_choose(item.sequence, next(logits))] if chunk.wanted == "last" else []
            for item, chunk in zip(work, chunks, strict=True)
        ]


def _chunk(item: Work) -> Chunk:
    sequence = item.sequence
    start = sequence.slot.length
    return Chunk(
        slot=sequence.slot,
        token_ids=tuple(sequence.ids[start : start + item.count]),
        wanted="last" if item.count == sequence.pending else "none",
        adapter=sequence.request.adapter,
    )


def _choose(sequence: Sequence, row: NDArray[np.float32]) -> int:
    return sample(
        row,
        sequence.request.sampling,
        sequence=sequence.request.sequence,
        position=len(sequence.ids),
        history=sequence.ids,
    )
