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
        self._choices: list[Drafter | None] = []

    def propose(self, sequences: list[Sequence]) -> list[Proposal]:
        """A proposal for each sequence, maybe empty."""
        plans = self._plans(sequences)
        self._choices = [drafter for drafter, _ in plans]
        proposals = [Proposal() for _ in sequences]
        for drafter in self._drafting.drafters:
            mine = [index for index, choice in enumerate(self._choices) if choice is drafter]
            if not mine:
                continue
            asks = [Ask(sequences[i], plans[i][1].length, plans[i][1].floor) for i in mine]
            start = self._clock()
            found = drafter.propose(asks, self._cache)
            steps = max(1, *(proposal.steps for proposal in found))
            self._steps[drafter.name].learn(len(mine), (self._clock() - start) / steps)
            for index, proposal in zip(mine, found, strict=True):
                self._check(proposal, drafter)
                proposals[index] = proposal
        return proposals

    def learn(self, proposals: list[Proposal], accepted: list[int], seconds: float | None) -> None:
        """What became of the proposals; `seconds` of a forward of these sequences and no other."""
        for drafter, proposal, right in zip(self._choices, proposals, accepted, strict=True):
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

    def _plans(self, sequences: list[Sequence]) -> list[tuple[Drafter | None, Plan]]:
        rooms = [min(self._drafting.rows - 1, sequence.room - 1) for sequence in sequences]
        if self._drafting.length is not None:
            return [
                self._longest(sequence, room)
                for sequence, room in zip(sequences, rooms, strict=True)
            ]
        nothing: list[tuple[Drafter | None, Plan]] = [(None, Plan(0, 0.0)) for _ in sequences]
        if self._since_plain >= STALE or self._forward.at(1) is None:
            return nothing
        plans = [
            self._fastest(sequence, room, len(sequences))
            for sequence, room in zip(sequences, rooms, strict=True)
        ]
        if any(plan.length for _, plan in plans):
            self._resting = 0
            return plans
        self._resting += 1
        if self._resting < self._patience:
            return nothing
        self._resting, self._patience = 0, min(2 * self._patience, LONGEST_PATIENCE)
        return [
            self._longest(sequence, min(room, 1))
            for sequence, room in zip(sequences, rooms, strict=True)
        ]

    def _longest(self, sequence: Sequence, room: int) -> tuple[Drafter | None, Plan]:
        """By the drafter with the most tokens, however slow."""
        if room < 1:
            return None, Plan(0, 0.0)
        prospects = [(drafter, drafter.prospects(sequence, room)) for drafter in self._drafters]
        drafter, rates = max(prospects, key=lambda it: most_tokens(it[1]))
        return (drafter, Plan(len(rates), 0.0)) if rates else (None, Plan(0, 0.0))

    def _fastest(
        self, sequence: Sequence, room: int, sequences: int
    ) -> tuple[Drafter | None, Plan]:
        """By the drafter and the length of the most tokens per second."""
        plans = [
            (
                drafter,
                best_plan(
                    drafter.prospects(sequence, max(room, 0)),
                    self._forward,
                    sequences=sequences,
                    step_s=self._steps[drafter.name].at(sequences) or 0.0,
                ),
            )
            for drafter in self._drafters
        ]
        drafter, plan = max(plans, key=lambda it: it[1].speed)
        return (drafter, plan) if plan.length else (None, plan)

    @property
    def _drafters(self) -> tuple[Drafter, ...]:
        return self._drafting.drafters

    def _check(self, proposal: Proposal, drafter: Drafter) -> None:
        for token in proposal.token_ids:
            if not 0 <= token < self._vocab:
                raise InvalidInputError(
                    f"the drafter '{drafter.name}' proposes id {token}; "
                    f"the vocabulary is [0, {self._vocab})",
                    hint="the drafter belongs to another model; --draft off runs without it",
                )
