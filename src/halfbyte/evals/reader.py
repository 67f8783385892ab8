"""A decoder that reads windows of text: the scored rows, a few at a time.

A row is either its logits or, with `states`, the normed final hidden state that the head makes
them of. What comes out at once is bounded in bytes, not in rows, so that a vocabulary of 262,144
needs no more memory than one of 8,192. One sequence, one cache, a fresh slot per window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.evals.texts import Window
from halfbyte.kernels.contract import Array, Graph
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.specs import KVType

PAGE = 64
AT_ONCE = 1 << 24  # numbers that come out at once: 64 MiB of f32


class Reader:
    """A decoder, with its first adapter if it has some, and a cache for a window of tokens."""

    def __init__(self, decoder: Decoder, window: int, kv: KVType, *, states: bool = False) -> None:
        if window > decoder.spec.context:
            raise InvalidInputError(
                f"a window of {window} tokens is beyond the context of {decoder.spec.context}",
                where="--window",
            )
        self.width = decoder.spec.hidden if states else decoder.spec.vocab
        self._decoder = decoder
        self._adapter = next(iter(decoder.adapters), None)
        self._pages = list(range(-(-window // PAGE)))
        shape = CacheShape(pages=len(self._pages), page_len=PAGE, ring_slack=window, kind=kv)
        self._cache = decoder.new_cache(shape, self._states if states else None)

    def rows(self, window: Window) -> Iterator[np.ndarray]:
        """The scored rows f32 of a window, in order, in pieces [rows, width]."""
        slot = Slot(pages=self._pages)
        ids, end, step = window.token_ids, len(window.token_ids) - 1, max(1, AT_ONCE // self.width)
        if window.first:
            context = Chunk(
                slot=slot, token_ids=ids[: window.first], wanted="none", adapter=self._adapter
            )
            self._decoder.forward([context], self._cache)
        for start in range(window.first, end, step):
            piece = ids[start : min(start + step, end)]
            chunk = Chunk(slot=slot, token_ids=piece, wanted="all", adapter=self._adapter)
            yield self._decoder.forward([chunk], self._cache)

    def _states(self, caches: Sequence[Array]) -> Graph:
        return lambda rows, wanted: (self._decoder.states(rows, caches, wanted),)
