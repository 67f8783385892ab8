"""How many drafts are right, as they run; and what that is worth where a step takes what it takes.

Acceptance is counted by the engine over whole answers. Drafts that count as right change with the
text and the sampling, not with the machine; seconds do with the machine alone. So the gain to be
expected is a formula of both, and can be had for rates that somebody assumes, too:

    tokens of a round / (K steps of the drafter + a forward of K + 1 rows), in plain forwards.

See Leviathan, Kalman, Matias (ICML 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from halfbyte.engine import Completion, Drafting, Engine
from halfbyte.engine.drafters import Drafter
from halfbyte.evals.bench import ROW_REPEATS, Trial, bench, token
from halfbyte.models.cache import Slot, shape_for
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.drafter import DraftModel
from halfbyte.specs import KVType, Request

TOGETHER = 16  # answers at once; they are the same alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """What became of drafts, `length` of them a round: `by_position[i]` is how often, of all
    `rounds` with drafts, draft `i` was right and all before it. `share` is that of rounds with
    drafts among all; without any, a drafter had nothing to say."""

    drafter: str
    length: int
    tokens: int
    rounds: int
    by_position: tuple[float, ...]
    share: float

    @property
    def tokens_per_round(self) -> float:
        """With the target's own; of rounds with drafts."""
        return 1 + sum(self.by_position)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds here: of a forward of one row, two, ...; and of a step of the drafter."""

    rows: tuple[float, ...]
    draft: float

    def gain(self, rates: Sequence[float], share: float = 1.0) -> float:
        """How much faster than plain decoding it is where draft `i` is right, with all before it,
        in `rates[i]` of the rounds with drafts, and these are a `share` of all rounds."""
        plain = self.rows[0]
        seconds = share * (len(rates) * self.draft + self.rows[len(rates)]) + (1 - share) * plain
        return (1 + share * sum(rates)) * plain / seconds


def accepted(
    decoder: Decoder,
    drafter: Drafter,
    requests: Sequence[Request],
    *,
    length: int,
    context: int,
    kv: KVType = "bf16",
) -> Acceptance:
    """The drafts of `drafter` in the answers to requests, always `length` of them a round."""
    done: list[Completion] = []
    for start in range(0, len(requests), TOGETHER):
        some = requests[start : start + TOGETHER]
        engine = Engine(
            decoder,
            context=context,
            max_sequences=len(some),
            kv=kv,
            drafting=Drafting(drafters=(drafter,), length=length),
        )
        done += engine.generate(some)
        engine.close()
    stats = [it.draft for it in done if it.draft is not None]
    rounds = sum(it.rounds for it in stats)
    right = [0] * length
    for it in stats:
        for place, count in enumerate(it.accepted_by_position):
            right[place] += count
    return Acceptance(
        drafter=drafter.name,
        length=length,
        tokens=sum(len(it.token_ids) for it in done),
        rounds=rounds,
        by_position=tuple(count / max(1, rounds) for count in right),
        share=rounds / max(1, rounds + sum(it.plain_rounds for it in stats)),
    )


def costs(decoder: Decoder, drafter: DraftModel | None, *, most: int, kv: KVType = "bf16") -> Costs:
    """The medians of some forwards of 1 .. `most + 1` rows, and of the drafter's steps."""
    rows = bench(decoder, [Trial("rows", count) for count in range(1, most + 2)], kv=kv)
    return Costs(
        rows=tuple(row.median_s for row in rows),
        draft=0.0 if drafter is None else _step_s(decoder, drafter, kv),
    )


def _step_s(decoder: Decoder, drafter: DraftModel, kv: KVType) -> float:
    """A step behind some tokens."""
    vocab, depth = decoder.spec.vocab, 64
    shape = shape_for(context=depth, sequences=1, rows=depth, kind=kv)
    cache = decoder.new_cache(shape)
    slot = Slot(pages=list(range(shape.pages)))
    chunk = Chunk(slot=slot, token_ids=[token(position, vocab) for position in range(depth)])
    states = np.array(decoder.outputs([chunk], cache)[1])
    times: list[float] = []
    for _ in range(4 * ROW_REPEATS):
        start = perf_counter()
        drafter.forward([1], states, [slot], cache)
        times.append(perf_counter() - start)
    return float(np.median(times))
