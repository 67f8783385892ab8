"""Who drafts in a round, and how much: the choice among drafters, and what is learned from it.

Left to itself (`Drafting.length` None) it takes, for every sequence, the drafter and the length
with the most tokens per second by what was measured so far; where nothing beats plain decoding it
rests, and tries a single draft ever more seldom. With a fixed length it always drafts that many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.engine.drafters import Ask, Drafter, Proposal
from halfbyte.engine.pace import Costs, Plan, best_plan, most_tokens
from halfbyte.engine.sequence import Sequence
from halfbyte.engine.speculate import Verdict, verify
from halfbyte.errors import InvalidInputError
from halfbyte.models.cache import DRAFT_ROWS, Cache

Clock = Callable[[], float]

MOST = DRAFT_ROWS - 1
# A plain round is timed anew after so many others.
STALE = 128
# Rounds of rest before a draft is tried again: at first, and at last.
PATIENCE, LONGEST_PATIENCE = 16, 512

Choice = tuple[Drafter | None, Plan]
NOBODY: Choice = (None, Plan(0, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How an engine drafts: by whom, how many in every round (None: as many as pay), and what
    counts as right (anything but `verify` changes the output)."""

    drafters: tuple[Drafter, ...]
    length: int | None = None
    verdict: Verdict = verify

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise InvalidInputError(f"{self.length} drafts a round", hint="at least 1, or none")

    @property
    def rows(self) -> int:
        """The most rows of one sequence in a round."""
        return 1 + (self.length or MOST)


class Speculator:
    """The drafting of one engine. `vocab` bounds what may be proposed."""

    def __init__(self, drafting: Drafting, cache: Cache, vocab: int, clock: Clock) -> None:
        self._drafting = drafting
        self._cache = cache
        self._vocab = vocab
        self._clock = clock
        self._forward = Costs()
        self._steps = {drafter.name: Costs() for drafter in drafting.drafters}
        self._since_plain = 0
        self._resting = 0
        self._patience = PATIENCE
        self._chosen: list[Drafter | None] = []

    def propose(self, sequences: list[Sequence]) -> list[Proposal]:
        """A proposal for each sequence, maybe empty."""
        choices = self._choose(sequences)
        self._chosen = [drafter for drafter, _ in choices]
        proposals = [Proposal() for _ in sequences]
        for drafter in self._drafting.drafters:
            asks = {
                index: Ask(sequences[index], plan.length, plan.floor)
                for index, (chosen, plan) in enumerate(choices)
                if chosen is drafter
            }
            found = self._ask(drafter, [*asks.values()]) if asks else []
            for index, proposal in zip(asks, found, strict=True):
                proposals[index] = proposal
        return proposals

    def _ask(self, drafter: Drafter, asks: list[Ask]) -> list[Proposal]:
        """What a drafter proposes, and how long a step of it takes."""
        start = self._clock()
        found = drafter.propose(asks, self._cache)
        seconds = self._clock() - start
        steps = max(1, *(proposal.steps for proposal in found))
        self._steps[drafter.name].learn(len(asks), seconds / steps)
        for proposal in found:
            self._check(proposal, drafter)
        return found

    def learn(self, proposals: list[Proposal], accepted: list[int], seconds: float | None) -> None:
        """What became of the proposals; `seconds` of a forward of these sequences and no other."""
        for drafter, proposal, right in zip(self._chosen, proposals, accepted, strict=True):
            if drafter is not None:
                drafter.learn(proposal, right)
        if any(accepted):
            self._patience = PATIENCE
        rows = sum(1 + len(proposal.token_ids) for proposal in proposals)
        if seconds is not None:
            self._forward.learn(rows, seconds)
        self._since_plain = 0 if rows == len(proposals) else self._since_plain + 1

    def plain_step_s(self, sequences: int) -> float | None:
        """What a forward of so many sequences takes without drafts, if that was timed."""
        return self._forward.measured(sequences)

    def _choose(self, sequences: list[Sequence]) -> list[Choice]:
        """Who drafts for each sequence, and how much."""
        rooms = [min(self._drafting.rows, sequence.room) - 1 for sequence in sequences]
        asked = [*zip(sequences, rooms, strict=True)]
        if self._drafting.length is not None:
            return [self._longest(sequence, room) for sequence, room in asked]
        if self._since_plain >= STALE or self._forward.at(1) is None:
            return [NOBODY] * len(asked)
        found = [self._fastest(sequence, room, len(asked)) for sequence, room in asked]
        if any(plan.length for _, plan in found):
            self._resting = 0
            return found
        if self._has_rested():
            return [self._longest(sequence, min(room, 1)) for sequence, room in asked]
        return [NOBODY] * len(asked)

    def _has_rested(self) -> bool:
        """Whether it is time to try a draft again; the next rest is twice as long."""
        self._resting += 1
        if self._resting < self._patience:
            return False
        self._resting, self._patience = 0, min(2 * self._patience, LONGEST_PATIENCE)
        return True

    def _longest(self, sequence: Sequence, room: int) -> Choice:
        """The drafter with the most tokens, however slow."""
        found = [(it, it.prospects(sequence, room)) for it in self._drafting.drafters]
        drafter, rates = max(found, key=lambda it: most_tokens(it[1]))
        return (drafter, Plan(len(rates), 0.0)) if rates else NOBODY

    def _fastest(self, sequence: Sequence, room: int, sequences: int) -> Choice:
        """The drafter and the length with the most tokens per second."""
        found = [
            (it, self._plan(it, it.prospects(sequence, room), sequences))
            for it in self._drafting.drafters
        ]
        drafter, plan = max(found, key=lambda it: it[1].speed)
        return (drafter, plan) if plan.length else NOBODY

    def _plan(self, drafter: Drafter, rates: list[float], sequences: int) -> Plan:
        step_s = self._steps[drafter.name].at(sequences) or 0.0
        return best_plan(rates, self._forward, sequences=sequences, step_s=step_s)

    def _check(self, proposal: Proposal, drafter: Drafter) -> None:
        for token in proposal.token_ids:
            if not 0 <= token < self._vocab:
                raise InvalidInputError(
                    f"the drafter '{drafter.name}' proposes id {token}; "
                    f"the vocabulary is [0, {self._vocab})",
                    hint="the drafter belongs to another model; --draft off runs without it",
                )
