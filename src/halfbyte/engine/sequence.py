"""One request on its way: the ids so far, where it lives in the cache, and how it ended.

Prefill and decoding are one thing here: a sequence has ids, the cache has computed the first
`slot.length` of them, and the rest are `pending`. A step computes pending ids; when none is left
over, its last row of logits chooses what to `commit`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.logprobs import Logprobs
from halfbyte.engine.sampling import sample
from halfbyte.engine.speculate import DraftStats, Tally
from halfbyte.kernels.contract import Draw
from halfbyte.models.cache import Slot
from halfbyte.specs import Request

FinishReason = Literal["stop", "length", "abort", "memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What became of a request. Stop ids are not part of `token_ids`.

    "length" is the end of `max_tokens` or of the context; "memory" that a step had too little. Of
    the prompt, the cache still had `cached_tokens`. Seconds are those of the steps the sequence
    took part in, shared with whatever ran beside it: `prefill_s` to the first token, `decode_s`
    from there on, in which `decode_tokens` were chosen (a stop id counts). `draft` is None where
    nothing drafts.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    decode_tokens: int
    prefill_s: float
    decode_s: float
    draft: DraftStats | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token that was chosen; whether it was drafted; how likely it was, if that was asked."""

    token_id: int
    drafted: bool = False
    logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One token of a sequence, or its end, or both; the last event carries the completion.

    The first carries how likely the ids of the prompt were, from the second on, if that was asked.
    """

    sequence: int
    token_id: int | None
    drafted: bool = False
    logprobs: Logprobs | None = None
    prompt_logprobs: tuple[Logprobs, ...] = ()
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Sequence:
    """A request and its state. It holds at most `limit` ids, the prompt among them.

    `outbox` is where its events go; several sequences may share one. `state` is the target's where
    it chose the last id: what a drafter goes on from. `cached` of its ids were not computed;
    `marks` are lengths whose cells should outlive it. `prompt_logprobs` wait for the first event.
    """

    number: int
    request: Request
    limit: int
    outbox: list[Event]
    ids: list[int]
    slot: Slot
    finish_reason: FinishReason | None = None
    chosen: int = 0
    cached: int = 0
    marks: list[int] = field(default_factory=list[int])
    prompt_logprobs: list[Logprobs] = field(default_factory=list[Logprobs])
    prefill_s: float = 0.0
    decode_s: float = 0.0
    state: NDArray[np.float32] | None = None
    tally: Tally | None = None

    @property
    def pending(self) -> int:
        """How many ids the cache has not computed."""
        return len(self.ids) - self.slot.length

    @property
    def answer(self) -> list[int]:
        """The ids after the prompt."""
        return self.ids[len(self.request.prompt_ids) :]

    @property
    def room(self) -> int:
        """How many ids may still come."""
        return self.limit - len(self.ids)

    def draw(self, more: Collection[int]) -> Draw | None:
        """How the token after the ids so far and `more` is chosen; None where more than sampling
        decides, or more than the token is asked for."""
        request, guide = self.request, self.request.guide
        mask = None if guide is None else guide.allowed([*self.answer, *more])
        told = request.top_logprobs is not None or (request.prompt_logprobs and not self.chosen)
        if mask is not None or told:
            return None
        position = len(self.ids) + len(more)
        return Draw(sampling=request.sampling, sequence=request.sequence, position=position)

    def choose(self, logits: NDArray[np.float32], more: Collection[int] = ()) -> int:
        """The token after the ids so far and `more`, from its row of logits."""
        request, sampling = self.request, self.request.sampling
        counts = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        chosen = [*self.answer, *more] if counts or request.guide is not None else ()
        return sample(
            logits,
            sampling,
            sequence=request.sequence,
            position=len(self.ids) + len(more),
            history=[*self.ids, *more] if sampling.repetition_penalty != 1 else (),
            chosen=chosen,
            allowed=None if request.guide is None else request.guide.allowed(chosen),
        )

    def spend(self, seconds: float) -> None:
        """Charge a step, before its tokens are committed."""
        if self.chosen:
            self.decode_s += seconds
        else:
            self.prefill_s += seconds

    def commit(self, tokens: Iterable[Chosen]) -> None:
        """Take the tokens chosen, in order, up to the end of the sequence; the rest is dropped."""
        for token in tokens:
            self.chosen += 1
            if token.token_id in self.request.stop_ids:
                self.finish("stop")
                return
            self.ids.append(token.token_id)
            if len(self.ids) == self.limit:
                self.finish("length", token)
                return
            self.outbox.append(self._event(token))

    def finish(self, reason: FinishReason, token: Chosen | None = None) -> None:
        """End here, with the last token if there is one."""
        self.finish_reason = reason
        completion = Completion(
            token_ids=tuple(self.answer),
            finish_reason=reason,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=self.cached,
            decode_tokens=max(self.chosen - 1, 0),
            prefill_s=self.prefill_s,
            decode_s=self.decode_s,
            draft=None if self.tally is None else self.tally.stats(),
        )
        event = self._event(token)
        self.outbox.append(replace(event, finish_reason=reason, completion=completion))

    def _event(self, token: Chosen | None) -> Event:
        prompt, self.prompt_logprobs = tuple(self.prompt_logprobs), []
        if token is None:
            return Event(sequence=self.number, token_id=None, prompt_logprobs=prompt)
        return Event(
            sequence=self.number,
            token_id=token.token_id,
            drafted=token.drafted,
            logprobs=token.logprobs,
            prompt_logprobs=prompt,
        )
