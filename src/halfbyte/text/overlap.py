"""Whether two texts share passages, told from a small fingerprint of one of them.

A text is its runs of `RUN` consecutive tokens, hashed. The `KEPT` smallest hashes are a fair sample
of them (a bottom-k sketch: Cohen and Kaplan 2007), so the share of the sample that another text
holds estimates the share of the passages that it holds. Equal, contained and containing texts are
all found, wherever the passages stand, and a fingerprint gives nothing away of what was said.

What it is not: a detector of paraphrases, or of a few shared lines in a large text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

RUN = 32
KEPT = 256
# Odd, so that no token is lost in the product; the digits of the golden ratio.
FACTOR = np.uint64(0x9E3779B97F4A7C15)

Hashes = NDArray[np.uint64]


def fingerprint(windows: Iterable[Sequence[int]]) -> str:
    """The smallest hashes of the runs of windows of token ids, in hex; "" for tiny windows."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(_hashes(window) for window in windows)])
    return np.unique(hashes)[:KEPT].astype(">u8").tobytes().hex()


def shared(known: str, token_ids: Sequence[int]) -> float:
    """The share, 0 to 1, of a fingerprinted text's passages that stand in another text."""
    wanted = np.frombuffer(bytes.fromhex(known), ">u8").astype(np.uint64)
    return float(np.isin(wanted, _hashes(token_ids)).mean()) if len(wanted) else 0.0


def _hashes(token_ids: Sequence[int]) -> Hashes:
    """One hash per run of `RUN` tokens."""
    ids = np.asarray(token_ids, dtype=np.uint64)
    count = max(0, len(ids) - RUN + 1)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(RUN):
        total = total * FACTOR + ids[offset : offset + count]
    return _mixed(total)


def _mixed(values: Hashes) -> Hashes:
    """Every bit depends on every bit (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
