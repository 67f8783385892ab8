"""Drafters for tests: any function of a sequence and its drafts so far, right, wrong or random."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from fake_decoder import VOCAB, logits_after

from halfbyte.engine import sample
from halfbyte.engine.drafters import Ask, Proposal
from halfbyte.engine.pace import Acceptance
from halfbyte.engine.sequence import Sequence as Running

Next = Callable[[Running, Sequence[int]], int]


class FunctionDrafter:
    """Proposes what a function says comes next, and learns how often that is right."""

    name = "function"

    def __init__(self, following: Next) -> None:
        self.following = following
        self.acceptance = Acceptance(lambda _: 0.6)

    def prepare(self, cache: object, sequences: int) -> None:
        """There is nothing to get ready."""

    def prospects(self, sequence: Running, most: int) -> list[float]:
        return [self.acceptance.rate(0)] * most

    def propose(self, asks: Sequence[Ask], cache: object) -> list[Proposal]:
        return [self._proposal(ask) for ask in asks]

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self.acceptance.learn(proposal.levels, accepted)

    def _proposal(self, ask: Ask) -> Proposal:
        proposal = Proposal()
        for _ in range(ask.length):
            proposal.token_ids.append(self.following(ask.sequence, proposal.token_ids))
            proposal.levels.append(0)
            proposal.steps += 1
        return proposal


def right(sequence: Running, drafts: Sequence[int]) -> int:
    """What the fake decoder's target will choose."""
    ids = [*sequence.ids, *drafts]
    return sample(
        logits_after(ids),
        sequence.request.sampling,
        sequence=sequence.request.sequence,
        position=len(ids),
        history=ids,
    )


def wrong(sequence: Running, drafts: Sequence[int]) -> int:
    return (right(sequence, drafts) + 1) % VOCAB


def at_random(vocab: int, seed: int = 0, *, chance: float = 0.0, truth: Next = right) -> Next:
    """Any token; with `chance` the right one."""
    random = np.random.default_rng(seed)

    def following(sequence: Running, drafts: Sequence[int]) -> int:
        if random.random() < chance:
            return truth(sequence, drafts)
        return int(random.integers(vocab))

    return following
