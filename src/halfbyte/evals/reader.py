"""A decoder that reads windows of text: the logits of the scored rows, a few rows at a time.

What comes out at once is bounded in bytes, not in rows, so that a vocabulary of 262,144 needs no
more memory than one of 8,192. One sequence, one cache, a fresh slot per window.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.evals.texts import Window
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.specs import KVType

PAGE = 64
LOGITS = 1 << 24  # logits that exist at once: 64 MiB of f32


class Reader:
    """A decoder, with its first adapter if it has some, and a cache for a window of tokens."""

    def __init__(self, decoder: Decoder, window: int, kv: KVType) -> None:
        if window > decoder.spec.context:
            raise InvalidInputError(
                f"a window of {window} tokens is beyond the context of {decoder.spec.context}",
                where="--window",
            )
        self.vocab = decoder.spec.vocab
        self._decoder = decoder
        self._adapter = next(iter(decoder.adapters), None)
        self._pages = list(range(-(-window // PAGE)))
        self._cache = decoder.new_cache(
            CacheShape(pages=len(self._pages), page_len=PAGE, ring_slack=window, kind=kv)
        )

    def logits(self, window: Window) -> Iterator[np.ndarray]:
        """Logits f32 of the scored rows, in order: [rows, V], with the same rows for every
        decoder of this vocabulary."""
        slot = Slot(pages=self._pages)
        ids, end, step = window.token_ids, len(window.token_ids) - 1, max(1, LOGITS // self.vocab)
        if window.first:
            context = Chunk(
                slot=slot, token_ids=ids[: window.first], wanted="none", adapter=self._adapter
            )
            self._decoder.forward([context], self._cache)
        for start in range(window.first, end, step):
            piece = ids[start : min(start + step, end)]
            chunk = Chunk(slot=slot, token_ids=piece, wanted="all", adapter=self._adapter)
            yield self._decoder.forward([chunk], self._cache)
