"""How likely a token was: its log-probability by the model itself, before any filter or penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The natural logarithm of a token's probability, and the likeliest tokens with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprobs_of(logits: NDArray[np.float32], token_id: int, top: int) -> Logprobs:
    """Of a row of logits [vocab]: the token's, and the `top` likeliest tokens', best first."""
    best = float(logits.max())
    total = best + float(np.log(np.exp(logits - np.float32(best), dtype=np.float64).sum()))
    count = min(top, len(logits))
    likeliest = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.intp)
    likeliest = likeliest[np.lexsort((likeliest, -logits[likeliest]))]
    return Logprobs(
        logprob=float(logits[token_id]) - total,
        top=tuple((int(index), float(logits[index]) - total) for index in likeliest),
    )
