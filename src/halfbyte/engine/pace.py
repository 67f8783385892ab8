"""How many drafts are worth it: measured acceptance against measured seconds.

A round with `k` drafts takes `k` steps of the drafter and one forward of `k + 1` rows; it commits
one token and every draft up to the first wrong one. The best `k` has the most tokens per second; 0
is plain decoding. Nothing here touches a token: it decides what is tried, never what comes out.

For the formula see Leviathan, Kalman, Matias, "Fast inference from transformers via speculative
decoding" (ICML 2023), with the seconds of a forward as measured for each number of rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

# What another row costs, as a part of a forward, before it was ever measured.
GUESS = 0.05
KEPT = 9
MEMORY = 0.98
PRIOR_WEIGHT = 4.0


class Costs:
    """Seconds of something by its number of rows: the median of the last few times.

    Between measured numbers the line is taken, beyond them the mean slope. The first time of all is
    not counted: it records, allocates and warms up.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._warm = False

    def learn(self, rows: int, seconds: float) -> None:
        if self._warm:
            self._times.setdefault(rows, deque(maxlen=KEPT)).append(seconds)
        self._warm = True

    def measured(self, rows: int) -> float | None:
        """The seconds of exactly so many rows, if that was ever timed."""
        return median(self._times[rows]) if rows in self._times else None

    def at(self, rows: int) -> float | None:
        """The seconds of so many rows, as near as is known; None if nothing was timed."""
        if rows in self._times or not self._times:
            return self.measured(rows)
        known = {count: median(times) for count, times in sorted(self._times.items())}
        below = max((count for count in known if count < rows), default=None)
        above = min((count for count in known if count > rows), default=None)
        if below is None or above is None:
            nearest = min(known) if below is None else max(known)
            return max(known[nearest] + (rows - nearest) * _slope(known), known[nearest] / 2)
        share = (rows - below) / (above - below)
        return known[below] + share * (known[above] - known[below])


def _slope(known: dict[int, float]) -> float:
    first, last = min(known), max(known)
    if first == last:
        return GUESS * known[first]
    return max(0.0, (known[last] - known[first]) / (last - first))


class Acceptance:
    """How often drafts of a level were right lately; `prior` says what to think before any was."""

    def __init__(self, prior: Callable[[int], float]) -> None:
        self._prior = prior
        self._counts: dict[int, tuple[float, float]] = {}

    def rate(self, level: int) -> float:
        right, tried = self._counts.get(level, (0.0, 0.0))
        return (right + PRIOR_WEIGHT * self._prior(level)) / (tried + PRIOR_WEIGHT)

    def learn(self, levels: Sequence[int], accepted: int) -> None:
        """Of a chain of drafts of these levels, so many were right; the next was the last tried."""
        for index, level in enumerate(levels[: accepted + 1]):
            right, tried = self._counts.get(level, (0.0, 0.0))
            self._counts[level] = (MEMORY * right + (index < accepted), MEMORY * tried + 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """So many drafts, at most; tokens per second expected; `floor` is how likely a draft must be
    right, with all before it, to be worth its row."""

    length: int
    speed: float
    floor: float = 0.0


def best_plan(
    rates: Sequence[float], forward: Costs, *, sequences: int = 1, step_s: float = 0.0
) -> Plan:
    """The most tokens per second for `sequences` sequences of these prospects.

    `rates[i]`: how likely draft `i` is right if those before it are. `step_s`: one step of the
    drafter for all of them. `forward` has been timed.
    """
    plain_s = forward.at(sequences)
    assert plain_s is not None
    best = Plan(0, sequences / plain_s)
    tokens = chance = 1.0
    for length, rate in enumerate(rates, 1):
        chance *= rate
        tokens += chance
        forward_s = forward.at(sequences * (length + 1)) or plain_s
        speed = sequences * tokens / (length * step_s + forward_s)
        if speed > best.speed:
            row_s = (max(0.0, forward_s - plain_s) / length + step_s) / sequences
            best = Plan(length, speed, floor=row_s * speed)
    return best


def most_tokens(rates: Sequence[float]) -> float:
    """How many of a chain of drafts are right on average."""
    tokens, chance = 0.0, 1.0
    for rate in rates:
        chance *= rate
        tokens += chance
    return tokens
