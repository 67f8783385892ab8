"""Where in a window two models part: mean KL by position.

A wrong rope base or scaling grows with the distance between tokens; a wrong window is nothing until
its edge and something after it. A mean over all positions shows neither.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Mean KL in nats: of the first and of the last quarter of the scored positions, and of those
    within and beyond the smallest sliding window (None where there are no such positions)."""

    first_quarter: float
    last_quarter: float
    within_window: float | None
    beyond_window: float | None


def profile(kl: NDArray[np.float64], positions: NDArray[np.int64], window: int | None) -> Profile:
    """The profile of rows [tokens] at these positions of their windows of text.

    `window`: the positions that the narrowest layer sees; row `window` is the first to lose one.
    """
    first, last = int(positions.min()), int(positions.max())
    quarter = (last - first + 1) / 4
    beyond = positions >= (last + 1 if window is None else window)
    return Profile(
        first_quarter=float(kl[positions < first + max(quarter, 1)].mean()),
        last_quarter=float(kl[positions > last - max(quarter, 1)].mean()),
        within_window=_mean(kl[~beyond]),
        beyond_window=_mean(kl[beyond]),
    )


def _mean(kl: NDArray[np.float64]) -> float | None:
    return float(kl.mean()) if len(kl) else None
