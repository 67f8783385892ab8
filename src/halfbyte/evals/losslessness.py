"""The self-test of speculation: on this model and machine, drafts change no token.

Prompts are continued plainly, one at a time; then drafted for, all at once, by every kind of
drafter there is: one that is always right, always wrong, right by chance, what the text said
before, and the model's own drafter. Every token is compared. A difference is a bug of ours, or a
machine that computes a row otherwise when others stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.engine import Completion, Drafting, Engine, LookupDrafter, ModelDrafter
from halfbyte.engine.drafters import Ask, Drafter, Proposal
from halfbyte.formats.progress import Progress
from halfbyte.models.cache import Cache
from halfbyte.models.decoder import Decoder
from halfbyte.models.drafter import DraftModel
from halfbyte.specs import KVType, Request, SamplingParams

SAMPLINGS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0),
    "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1),
    "penalized": SamplingParams(temperature=0.7, min_p=0.05, repetition_penalty=1.2, seed=2),
}
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One drafter under one way to sample: tokens compared and how many differed.

    `first_difference` is the (prompt, place) of the first; `tokens_per_round` and `speedup` are
    None where nothing was drafted or timed.
    """

    drafter: str
    sampling: str
    tokens: int
    differing: int
    first_difference: tuple[int, int] | None
    tokens_per_round: float | None
    speedup: float | None


class ReplayDrafter:
    """Knows how each request goes on, and makes of the right token what `bend` says."""

    def __init__(self, answers: Mapping[Request, Ids], bend: Callable[[int], int]) -> None:
        self.name = "replay"
        self._answers = answers
        self._bend = bend

    def prepare(self, cache: Cache, sequences: int) -> None:
        """There is nothing to get ready."""

    def prospects(self, sequence: object, most: int) -> list[float]:
        return [0.9] * most

    def propose(self, asks: list[Ask], cache: Cache) -> list[Proposal]:
        return [self._proposal(ask) for ask in asks]

    def learn(self, proposal: Proposal, accepted: int) -> None:
        pass

    def _proposal(self, ask: Ask) -> Proposal:
        request = ask.sequence.request
        said = len(ask.sequence.ids) - len(request.prompt_ids)
        drafts = self._answers[request][said : said + ask.length]
        return Proposal([self._bend(token) for token in drafts], [0] * len(drafts))


def prove(
    decoder: Decoder,
    drafter: DraftModel | None,
    prompts: Sequence[Ids],
    *,
    tokens: int,
    kv: KVType = "bf16",
    progress: Progress | None = None,
) -> list[Trial]:
    """A trial for each drafter and sampling; `tokens` are chosen after every prompt."""
    trials: list[Trial] = []
    context = max(map(len, prompts)) + tokens
    for done, (name, sampling) in enumerate(SAMPLINGS.items()):
        requests = [
            Request(prompt_ids=ids, sampling=sampling, max_tokens=tokens, sequence=number)
            for number, ids in enumerate(prompts)
        ]
        plain = Engine(decoder, context=context, kv=kv).generate(requests)
        for who, drafting in _draftings(decoder, drafter, dict(zip(requests, plain, strict=True))):
            engine = Engine(
                decoder, context=context, kv=kv, max_sequences=len(prompts), drafting=drafting
            )
            trials.append(_trial(who, name, plain, engine.generate(requests)))
        if progress is not None:
            progress(done + 1, len(SAMPLINGS))
    return trials


def _draftings(
    decoder: Decoder, model: DraftModel | None, plain: Mapping[Request, Completion]
) -> list[tuple[str, Drafting]]:
    answers = {request: done.token_ids for request, done in plain.items()}
    vocab, random = decoder.spec.vocab, np.random.default_rng(0)

    def at_times_wrong(token: int) -> int:
        return token if random.random() < 0.7 else int(random.integers(vocab))

    def fixed(drafter: Drafter, length: int) -> Drafting:
        return Drafting(drafters=(drafter,), length=length)

    found = [
        ("always right", fixed(ReplayDrafter(answers, lambda token: token), 7)),
        ("always wrong", fixed(ReplayDrafter(answers, lambda token: (token + 1) % vocab), 3)),
        ("right by chance", fixed(ReplayDrafter(answers, at_times_wrong), 5)),
        ("lookup", fixed(LookupDrafter(), 4)),
    ]
    if model is not None:
        found.append(("model", fixed(ModelDrafter(model), 4)))
    own: tuple[Drafter, ...] = () if model is None else (ModelDrafter(model),)
    return [*found, ("as it runs", Drafting(drafters=(LookupDrafter(), *own)))]


def _trial(
    drafter: str, sampling: str, plain: Sequence[Completion], drafted: Sequence[Completion]
) -> Trial:
    differing = [
        (prompt, place)
        for prompt, (one, other) in enumerate(zip(plain, drafted, strict=True))
        for place, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True))
        if a != b
    ]
    stats = [done.draft for done in drafted if done.draft is not None]
    rounds = sum(it.rounds for it in stats)
    gains = [it.speedup for it in stats if it.speedup is not None]
    return Trial(
        drafter=drafter,
        sampling=sampling,
        tokens=sum(len(done.token_ids) for done in plain),
        differing=len(differing),
        first_difference=next(iter(differing), None),
        tokens_per_round=1 + sum(it.accepted for it in stats) / rounds if rounds else None,
        speedup=sum(gains) / len(gains) if gains else None,
    )
