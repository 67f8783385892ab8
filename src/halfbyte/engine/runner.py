"""The only place that knows how a forward is executed: scheduled integers in, chosen tokens out.

A step commits a *list* of tokens per sequence: none while a prompt is still being computed; when
decoding, one, and every draft before it that was right. A round with drafts is one forward of the
last chosen id and all drafts, each row wanted; what was wrong is rolled back at once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.drafters import Proposal
from halfbyte.engine.drafting import Clock, Drafting, Speculator
from halfbyte.engine.logprobs import Logprobs, logprobs_of
from halfbyte.engine.sampling import not_logits
from halfbyte.engine.scheduler import Work
from halfbyte.engine.sequence import Chosen, Sequence
from halfbyte.engine.speculate import Tally, Verdict, verify
from halfbyte.kernels.contract import Draw
from halfbyte.models.cache import Cache
from halfbyte.models.decoder import Chunk, Decoder

NOTHING = Proposal()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    """What came of a forward: tokens that are chosen, or the logits to choose them from."""

    tokens: list[int] | None = None
    logits: NDArray[np.float32] | None = None
    states: NDArray[np.float32] | None = None

    def choice(self, sequence: Sequence, row: int, given: Collection[int]) -> int:
        """The target's token after those given, from the rows of its sequence."""
        if self.tokens is not None:
            return self.tokens[row + len(given)]
        assert self.logits is not None, "neither tokens nor logits"
        return sequence.choose(self.logits[row + len(given)], given)

    def logprobs(self, row: int, token: int, top: int | None) -> Logprobs | None:
        """What a request asked for beside a token; only of logits."""
        if top is None or self.logits is None:
            return None
        return logprobs_of(self.logits[row], token, top)


class Runner:
    """A decoder, the cache it works in, and maybe drafting."""

    def __init__(
        self, decoder: Decoder, cache: Cache, drafting: Drafting | None, clock: Clock
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._clock = clock
        self._verdict: Verdict = verify
        self._speculator: Speculator | None = None
        if drafting is not None and drafting.drafters:
            self._verdict = drafting.verdict
            self._speculator = Speculator(drafting, cache, decoder.spec.vocab, clock)

    @property
    def cache_bytes(self) -> int:
        return self._cache.nbytes

    @property
    def ring_len(self) -> int | None:
        """The length of the shortest ring, None where no layer slides."""
        return self._cache.ring_len

    def copy_ring(self, source: int, target: int) -> None:
        """What one ring holds, into another."""
        self._cache.copy_ring(source, target)

    def run(self, work: list[Work]) -> list[list[Chosen]]:
        """One forward; the tokens chosen for each item, in order. Slots have advanced."""
        start = self._clock()
        proposals = self._proposals(work)
        drafted = self._clock()
        chunks = [_chunk(item, it) for item, it in zip(work, proposals, strict=True)]
        answers = self._answers(work, proposals, chunks)
        tokens: list[list[Chosen]] = []
        row = 0
        for item, proposal, chunk in zip(work, proposals, chunks, strict=True):
            count = _count(chunk)
            rows = range(row, row + count)
            tokens.append(self._settled(item.sequence, proposal, answers, rows))
            row += count
        self._learn(work, proposals, tokens, drafted - start, self._clock() - drafted)
        return tokens

    def _proposals(self, work: list[Work]) -> list[Proposal]:
        if self._speculator is None:
            return [NOTHING] * len(work)
        decoding = [item.sequence for item in work if item.sequence.chosen]
        found = iter(self._speculator.propose(decoding))
        return [next(found) if item.sequence.chosen else NOTHING for item in work]

    def _answers(
        self, work: list[Work], proposals: list[Proposal], chunks: list[Chunk]
    ) -> _Answers:
        """One forward, and the choice of every wanted row: on the device where that is possible."""
        keeps = self._speculator is not None
        draws = _draws(work, proposals, chunks) if self._cache.chooses else None
        if draws is not None:
            found = self._decoder.choose(chunks, self._cache, draws, states=keeps)
            if found is not None:
                return _Answers(tokens=_checked(found.tokens), states=found.states)
        logits, states = self._decoder.outputs(chunks, self._cache)
        return _Answers(logits=logits, states=states if keeps else None)

    def _settled(
        self, sequence: Sequence, proposal: Proposal, answers: _Answers, rows: range
    ) -> list[Chosen]:
        """The tokens of a sequence from its wanted rows; what was drafted wrongly is taken back."""
        if _reads_prompt(sequence):
            assert answers.logits is not None, "a prompt is told from logits"
            rows = rows[_tell_prompt(sequence, answers.logits[rows.start : rows.stop])]
        if not rows:
            return []
        row, drafts = rows.start, proposal.token_ids
        tokens = self._verdict(drafts, lambda given: answers.choice(sequence, row, given))
        sequence.slot.rollback(1 + len(drafts) - len(tokens))
        last = len(tokens) - 1
        if answers.states is not None:
            sequence.state = answers.states[row + last].copy()
        top = sequence.request.top_logprobs
        return [
            Chosen(
                token,
                drafted=place < last,
                logprobs=answers.logprobs(row + place, token, top),
            )
            for place, token in enumerate(tokens)
        ]

    def _learn(
        self,
        work: list[Work],
        proposals: list[Proposal],
        tokens: list[list[Chosen]],
        draft_s: float,
        forward_s: float,
    ) -> None:
        if self._speculator is None:
            return
        decoding = [index for index, item in enumerate(work) if item.sequence.chosen]
        accepted = [len(tokens[index]) - 1 for index in decoding]
        alone = len(decoding) == len(work)
        self._speculator.learn(
            [proposals[index] for index in decoding], accepted, forward_s if alone else None
        )
        for index, right in zip(decoding, accepted, strict=True):
            tally = work[index].sequence.tally = work[index].sequence.tally or Tally()
            tally.count(len(proposals[index].token_ids), right, draft_s, forward_s)
            tally.plain_step_s = self._speculator.plain_step_s(len(decoding))


def _count(chunk: Chunk) -> int:
    """The wanted rows of a chunk."""
    return {"all": len(chunk.token_ids), "last": 1, "none": 0}[chunk.wanted]


def _draws(work: list[Work], proposals: list[Proposal], chunks: list[Chunk]) -> list[Draw] | None:
    """How the token of every wanted row is chosen; None where one takes more than a draw.

    A row behind drafts counts only where all of them are right, so they are what it comes after.
    """
    draws: list[Draw] = []
    for item, proposal, chunk in zip(work, proposals, chunks, strict=True):
        for place in range(_count(chunk)):
            draw = item.sequence.draw(proposal.token_ids[:place])
            if draw is None:
                return None
            draws.append(draw)
    return draws


def _checked(tokens: list[int]) -> list[int]:
    """The tokens, if the device could choose every one (`Choosing`)."""
    worst = min(tokens, default=0)
    if worst < 0:
        raise not_logits({-1: "NaN"}.get(worst, "infinity"))
    return tokens


def _chunk(item: Work, proposal: Proposal) -> Chunk:
    sequence = item.sequence
    start = sequence.slot.length
    drafts = proposal.token_ids
    every = drafts or _reads_prompt(sequence)
    wanted = "all" if every else "last" if item.count == sequence.pending else "none"
    return Chunk(
        slot=sequence.slot,
        token_ids=(*sequence.ids[start : start + item.count], *drafts),
        wanted=wanted,
        adapter=sequence.request.adapter,
    )


def _reads_prompt(sequence: Sequence) -> bool:
    """Whether the probabilities of a prompt's ids are wanted, and not all are told."""
    return sequence.request.prompt_logprobs and not sequence.chosen


def _tell_prompt(sequence: Sequence, logits: NDArray[np.float32]) -> slice:
    """Each row tells of the id after it; returns which rows are left for the first token: the last
    row of a complete prompt, or none."""
    length, top = sequence.slot.length, sequence.request.top_logprobs or 0
    following = sequence.ids[length - len(logits) + 1 : length + 1]
    told = zip(logits, following, strict=False)
    sequence.prompt_logprobs += [logprobs_of(row, token, top) for row, token in told]
    return slice(len(following), None if len(following) < len(logits) else 0)
