"""What proposes tokens: a model beside the target, or what the text has said before.

A drafter may be wrong at will; it never decides what is said. It chooses as the target would, with
the request's own filters and noise: where the two distributions agree, so do their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.lookup import Index, Match
from halfbyte.engine.pace import Acceptance
from halfbyte.engine.sampling import NothingLeftError
from halfbyte.engine.sequence import Sequence
from halfbyte.models.cache import Cache
from halfbyte.models.drafter import DraftModel

# Levels of confidence: so many to a unit of the margin, up to the highest.
MARGIN_STEPS, HIGHEST = 2, 19


@dataclass(frozen=True, slots=True)
class Ask:
    """Up to `length` drafts for a sequence; after the first none that is right, with all before it,
    less often than `floor`."""

    sequence: Sequence
    length: int
    floor: float


@dataclass(slots=True)
class Proposal:
    """Drafts in order, the level of acceptance that each was found at, and the steps it took."""

    token_ids: list[int] = field(default_factory=list[int])
    levels: list[int] = field(default_factory=list[int])
    steps: int = 0


class Drafter(Protocol):
    """Proposes for sequences whose last id the target has chosen and not yet computed."""

    name: str

    def prepare(self, cache: Cache, sequences: int) -> None:
        """Gets ready to propose for up to so many sequences of the target's cache."""
        ...

    def prospects(self, sequence: Sequence, most: int) -> list[float]:
        """How likely each of up to `most` drafts will be right if those before it are."""
        ...

    def propose(self, asks: list[Ask], cache: Cache) -> list[Proposal]:
        """One proposal for each; `cache` is the target's, and holds what it has committed."""
        ...

    def learn(self, proposal: Proposal, accepted: int) -> None:
        """The first `accepted` drafts of a proposal were right, and the next was not."""
        ...


class LookupDrafter:
    """Drafts what followed the longest earlier occurrence of the sequence's end."""

    name = "lookup"

    def __init__(self) -> None:
        self._acceptance = Acceptance(lambda length: length / (length + 2))
        self._indexes: WeakKeyDictionary[Sequence, Index] = WeakKeyDictionary()

    def prepare(self, cache: Cache, sequences: int) -> None:
        """There is nothing to get ready."""

    def prospects(self, sequence: Sequence, most: int) -> list[float]:
        match = self._match(sequence)
        return [] if match is None else [self._acceptance.rate(match.length)] * most

    def propose(self, asks: list[Ask], cache: Cache) -> list[Proposal]:
        return [self._proposal(ask) for ask in asks]

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self._acceptance.learn(proposal.levels, accepted)

    def _proposal(self, ask: Ask) -> Proposal:
        match = self._match(ask.sequence)
        if match is None:
            return Proposal()
        drafts = match.continued(ask.sequence.ids, ask.length)
        return Proposal(drafts, [match.length] * len(drafts))

    def _match(self, sequence: Sequence) -> Match | None:
        return self._indexes.setdefault(sequence, Index()).find(sequence.ids)


class ModelDrafter:
    """Drafts by a model that reads the target's keys, a step for all sequences at a time."""

    name = "model"

    def __init__(self, model: DraftModel) -> None:
        self._model = model
        self._by_place = Acceptance(lambda _: 0.6)
        # Of two tokens the better one has the logistic of the margin, of many somewhat less.
        self._by_confidence = Acceptance(lambda level: 0.9 / (1 + exp(-level / MARGIN_STEPS)))

    def prepare(self, cache: Cache, sequences: int) -> None:
        self._model.prepare(cache, sequences)

    def prospects(self, sequence: Sequence, most: int) -> list[float]:
        return [self._by_place.rate(place) for place in range(most)]

    def propose(self, asks: list[Ask], cache: Cache) -> list[Proposal]:
        chains = [_Chain(ask) for ask in asks]
        while going := [chain for chain in chains if chain.goes_on]:
            for chain, offer in zip(going, self._offers(going, cache), strict=True):
                chain.extend(offer, self._by_confidence)
        return [chain.proposal for chain in chains]

    def _offers(self, going: list[_Chain], cache: Cache) -> list[_Offer]:
        """A step of all chains; their tokens are chosen on the device where that is possible."""
        last = [chain.last for chain in going]
        states = np.stack([chain.state for chain in going])
        slots = [chain.ask.sequence.slot for chain in going]
        if cache.chooses:
            draws = [chain.ask.sequence.draw(chain.proposal.token_ids) for chain in going]
            known = [draw for draw in draws if draw is not None]
            alike = len(known) == len(draws)
            found = self._model.choose(last, states, slots, cache, known) if alike else None
            if found is not None and found.states is not None:
                told = zip(found.margins, found.states, found.tokens, strict=True)
                return [_Offer(float(margin), state, token) for margin, state, token in told]
        logits, states = self._model.forward(last, states, slots, cache)
        return [_Offer(margin(row), it, row) for row, it in zip(logits, states, strict=True)]

    def learn(self, proposal: Proposal, accepted: int) -> None:
        self._by_confidence.learn(proposal.levels, accepted)
        self._by_place.learn(range(len(proposal.levels)), accepted)


@dataclass(frozen=True, slots=True)
class _Offer:
    """One more token for a chain: how far it is above the next, the state behind it, and the token
    or the logits to choose it from. A token below 0 could not be chosen."""

    margin: float
    state: NDArray[np.float32]
    token: int | NDArray[np.float32]


class _Chain:
    """The drafts of one sequence under way."""

    def __init__(self, ask: Ask) -> None:
        assert ask.sequence.state is not None, "the target's state was not kept"
        self.ask = ask
        self.last = ask.sequence.ids[-1]
        self.state: NDArray[np.float32] = ask.sequence.state
        self.proposal = Proposal()
        self.goes_on = ask.length > 0
        self._chance = 1.0

    def extend(self, offer: _Offer, acceptance: Acceptance) -> None:
        """One more draft, unless it is too unsure to be worth a row.

        The first is always tried: only so is learned how unsure is too unsure.
        """
        level = int(min(offer.margin * MARGIN_STEPS, HIGHEST))
        drafts = self.proposal.token_ids
        self._chance *= acceptance.rate(level)
        self.proposal.steps += 1
        if drafts and self._chance < self.ask.floor:
            self.goes_on = False
            return
        token = self._chosen(offer.token)
        if token is None:
            self.goes_on = False
            return
        self.last, self.state = token, offer.state
        drafts.append(self.last)
        self.proposal.levels.append(level)
        self.goes_on = len(drafts) < self.ask.length

    def _chosen(self, found: int | NDArray[np.float32]) -> int | None:
        """The token, None where there is none to choose."""
        if isinstance(found, int):
            return found if found >= 0 else None
        try:
            return self.ask.sequence.choose(found, self.proposal.token_ids)
        except NothingLeftError:  # a head that lacks what a guide allows
            return None


def margin(logits: NDArray[np.float32]) -> float:
    """How far the best logit is above the next: confidence at the price of two looks at the row."""
    best = int(logits.argmax())
    others = (part.max(initial=-np.inf) for part in (logits[:best], logits[best + 1 :]))
    return float(logits[best] - max(others))
