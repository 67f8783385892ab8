"""A decoder without weights: the logits of a row are a hash of its ids, read back from the cache.

It keeps ids where the real one keeps keys, in pages and rings, so a page given twice, a ring
too short or a wrong length changes the logits or fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from halfbyte.engine.sampling import sample
from halfbyte.kernels.contract import Choice, Draw
from halfbyte.models.cache import CacheShape
from halfbyte.models.decoder import Chunk

VOCAB = 50
WINDOW = 7


def logits_after(ids: Sequence[int]) -> np.ndarray:
    """The row [VOCAB] that the last of `ids` produces."""
    seed = hash(tuple(ids)) % 2**63
    return np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 2


class FakeCache:
    def __init__(self, shape: CacheShape, chooses: bool) -> None:
        self.shape = shape
        self.chooses = chooses
        self.ring_len = WINDOW + shape.ring_slack
        self.pages = np.full((shape.pages, shape.page_len), -1)
        self.rings = np.full((shape.rings, self.ring_len, 2), -1)

    def copy_ring(self, source: int, target: int) -> None:
        self.rings[target] = self.rings[source]

    def prepare(self, rows: int, wanted: int, sequences: int) -> None:
        """Nothing to take."""


class FakeDecoder:
    """`interrupt_at`: the forward (counted from 0) that is interrupted halfway. One that `chooses`
    does so where logits are; `chosen` counts its tokens."""

    def __init__(
        self, *, context: int = 4096, interrupt_at: int | None = None, chooses: bool = False
    ) -> None:
        self.spec = SimpleNamespace(vocab=VOCAB, context=context)
        self.adapters = ()
        self.chooses = chooses
        self.chosen = 0
        self.interrupt_at = interrupt_at
        self.forwards: list[list[int]] = []

    def new_cache(self, shape: CacheShape) -> FakeCache:
        return FakeCache(shape, self.chooses)

    def choose(
        self, chunks: Sequence[Chunk], cache: FakeCache, draws: Sequence[Draw], *, states: bool
    ) -> Choice:
        logits, last = self.outputs(chunks, cache)
        self.chosen += len(draws)
        tokens = [
            sample(row, it.sampling, sequence=it.sequence, position=it.position, history=())
            for row, it in zip(logits, draws, strict=True)
        ]
        margins = np.zeros(len(tokens), dtype=np.float32)
        return Choice(tokens=tokens, margins=margins, states=last if states else None)

    def outputs(self, chunks: Sequence[Chunk], cache: FakeCache) -> tuple[np.ndarray, np.ndarray]:
        """Logits, and states that nobody should read."""
        self.forwards.append([len(chunk.token_ids) for chunk in chunks])
        assert chunks, "an empty forward"
        for chunk in chunks:
            self._store(chunk, cache)
        if self.interrupt_at == len(self.forwards) - 1:
            raise KeyboardInterrupt
        rows = [row for chunk in chunks for row in self._rows(chunk, cache)]
        logits = np.array(rows, dtype=np.float32).reshape(-1, VOCAB)
        return logits, np.full((len(rows), 1), np.nan, dtype=np.float32)

    def _store(self, chunk: Chunk, cache: FakeCache) -> None:
        slot, page_len = chunk.slot, cache.shape.page_len
        assert 1 <= len(chunk.token_ids) <= cache.shape.ring_slack
        span = slot.advance(len(chunk.token_ids))
        assert slot.length <= len(slot.pages) * page_len, "beyond the pages reserved"
        for position, token in enumerate(chunk.token_ids, start=span.start):
            cache.pages[slot.pages[position // page_len], position % page_len] = token
            cache.rings[slot.ring, position % cache.ring_len] = position, token

    def _rows(self, chunk: Chunk, cache: FakeCache) -> list[np.ndarray]:
        end = chunk.slot.length
        first = {"all": end - len(chunk.token_ids), "last": end - 1, "none": end}[chunk.wanted]
        return [self._row(chunk, cache, position) for position in range(first, end)]

    def _row(self, chunk: Chunk, cache: FakeCache, position: int) -> np.ndarray:
        ids = cache.pages[chunk.slot.pages].reshape(-1)[: position + 1].tolist()
        for seen in range(max(0, position - WINDOW + 1), position + 1):
            cell = cache.rings[chunk.slot.ring, seen % cache.ring_len].tolist()
            assert cell == [seen, ids[seen]], f"the ring holds {cell} for position {seen}"
        return logits_after(ids)
