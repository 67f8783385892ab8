"""How likely a model thinks the end of a sequence, given its beginning.

Sequences come one after the other, and what one shares with the one before is not read again: the
choices of a question, or questions behind the same examples. One sequence at a time, one cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import log_softmax
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder, Wanted
from halfbyte.specs import KVType

PAGE = 64
CHUNK = 512


@dataclass(frozen=True, slots=True)
class Ending:
    """The tokens of an ending, the log-probability of each, and the tokens that were likeliest."""

    ids: NDArray[np.int64]
    log_p: NDArray[np.float64]
    likeliest: NDArray[np.int64]

    @property
    def total(self) -> float:
        """The log-probability of the whole, in nats."""
        return float(self.log_p.sum())

    @property
    def nats(self) -> float:
        """What a token costs on average."""
        return -self.total / len(self.ids)

    @property
    def written(self) -> bool:
        """Whether a greedy model writes exactly this."""
        return bool((self.likeliest == self.ids).all())


class Likelihood:
    """A decoder and a cache for sequences of up to `longest` tokens."""

    def __init__(self, decoder: Decoder, longest: int, kv: KVType) -> None:
        if longest > decoder.spec.context:
            raise InvalidInputError(
                f"an item of {longest} tokens is beyond the context of {decoder.spec.context}"
            )
        self._decoder = decoder
        pages = -(-longest // PAGE)
        slack = max(longest, CHUNK)  # everything may be taken back
        shape = CacheShape(pages=pages, page_len=PAGE, ring_slack=slack, kind=kv)
        self._cache = decoder.new_cache(shape)
        self._slot = Slot(pages=list(range(pages)))
        self._read: Sequence[int] = ()

    def __call__(self, ids: Sequence[int], start: int) -> Ending:
        """The ending `ids[start:]` behind `ids[:start]`; `start` is at least 1."""
        kept = min(_shared(self._read, ids), start - 1)
        self._slot.rollback(self._slot.length - kept)
        self._forward(ids[kept : start - 1], "none")
        logits = self._forward(ids[start - 1 : -1], "all")
        self._read = ids[:-1]
        ending = np.asarray(ids[start:])
        log_p = log_softmax(logits)[np.arange(len(ending)), ending]
        return Ending(ending, log_p, logits.argmax(-1))

    def _forward(self, ids: Sequence[int], wanted: Wanted) -> NDArray[np.float32]:
        pieces = [
            self._decoder.forward(
                [Chunk(slot=self._slot, token_ids=ids[at : at + CHUNK], wanted=wanted)], self._cache
            ).copy()
            for at in range(0, len(ids), CHUNK)
        ]
        return np.concatenate(pieces) if pieces else np.empty((0, 0), np.float32)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of their common beginning."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
