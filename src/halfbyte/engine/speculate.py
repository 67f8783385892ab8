"""Which drafts a target accepts, and the count of them: pure functions and numbers.

A draft counts if and only if it equals the token that the target chooses at that place itself. The
noise of sampling is a function of the position (`noise`), so the target's choice does not depend on
having been drafted: with any drafter, and with none, the tokens are the same. What drafts change is
how many of them one forward commits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np

from halfbyte.errors import InvalidInputError

Choose = Callable[[Sequence[int]], int]
"""The target's next token after those of this round that are given."""

Verdict = Callable[[Sequence[int], Choose], list[int]]
"""(drafts, the target's choice) -> the tokens of the round, at least one."""


def verify(drafts: Sequence[int], choose: Choose) -> list[int]:
    """The drafts up to the first that the target would not have chosen, then its own choice."""
    tokens: list[int] = []
    for draft in drafts:
        tokens.append(choose(tokens))
        if tokens[-1] != draft:
            return tokens
    return [*tokens, choose(tokens)]


class SyntheticVerdict:
    """Accepts drafts by chance, whatever they are: to time a loop whose drafter is not trained.

    `rates[i]` is how often draft `i` is accepted, of all rounds that have one. What comes out is no
    text of the model. Raises `InvalidInputError` for rates that rise or lie outside [0, 1].
    """

    def __init__(self, rates: Sequence[float], seed: int = 0) -> None:
        before = [1.0, *rates[:-1]]
        if not rates or not all(
            isfinite(rate) and 0 <= rate <= last for rate, last in zip(rates, before, strict=True)
        ):
            raise InvalidInputError(
                f"acceptance rates {', '.join(map(str, rates)) or 'of nothing'}",
                hint="each is a share of all rounds, so none is above the one before it",
            )
        self._given_last = [
            rate / last if last else 0.0 for rate, last in zip(rates, before, strict=True)
        ]
        self._random = np.random.default_rng(seed)

    def __call__(self, drafts: Sequence[int], choose: Choose) -> list[int]:
        tokens: list[int] = []
        for draft, chance in zip(drafts, self._given_last, strict=False):
            own = choose(tokens)
            if self._random.random() >= chance:
                return [*tokens, own]
            tokens.append(draft)
        return [*tokens, choose(tokens)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftStats:
    """What drafting did for one sequence.

    `rounds` are forwards with drafts; of `proposed` drafts `accepted` were right,
    `accepted_by_position[i]` of them at place `i`. `plain_rounds` had no drafts: there was nothing
    to propose, or it would not have paid. Seconds as in `Completion`: of drafting, and of the
    forwards with and without drafts. `plain_step_s` is what a round without drafts takes, measured
    in this sequence or, if it had none, in others before it; None if there was no such round.
    """

    rounds: int
    proposed: int
    accepted: int
    accepted_by_position: tuple[int, ...]
    plain_rounds: int
    draft_s: float
    verify_s: float
    plain_s: float
    plain_step_s: float | None

    @property
    def tokens_per_round(self) -> float | None:
        """With the target's own; of rounds with drafts."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def speedup(self) -> float | None:
        """How much faster than without drafting, over all rounds."""
        seconds = self.draft_s + self.verify_s + self.plain_s
        if self.plain_step_s is None or seconds == 0:
            return None
        tokens = self.rounds + self.accepted + self.plain_rounds
        return tokens * self.plain_step_s / seconds


@dataclass(slots=True)
class Tally:
    """The running counts behind `DraftStats`."""

    rounds: int = 0
    proposed: int = 0
    accepted_by_position: list[int] = field(default_factory=list[int])
    plain_rounds: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_s: float = 0.0
    plain_step_s: float | None = None

    def count(self, proposed: int, accepted: int, draft_s: float, forward_s: float) -> None:
        """One round of decoding."""
        self.draft_s += draft_s
        if not proposed:
            self.plain_rounds += 1
            self.plain_s += forward_s
            return
        self.rounds += 1
        self.proposed += proposed
        self.verify_s += forward_s
        missing = proposed - len(self.accepted_by_position)
        self.accepted_by_position += [0] * missing
        for position in range(accepted):
            self.accepted_by_position[position] += 1

    def stats(self) -> DraftStats:
        own = self.plain_s / self.plain_rounds if self.plain_rounds else None
        return DraftStats(
            rounds=self.rounds,
            proposed=self.proposed,
            accepted=sum(self.accepted_by_position),
            accepted_by_position=tuple(self.accepted_by_position),
            plain_rounds=self.plain_rounds,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            plain_s=self.plain_s,
            plain_step_s=self.plain_step_s if own is None else own,
        )
