"""The speculative loop timed at given rates of acceptance, whatever the drafter would reach.

`speculate@D` is rounds of drafts behind D tokens: the drafter's steps, one forward of all drafts,
their verification and what is taken back, as in any run. Only whether a draft is right is left to
chance, so that an untrained drafter tells what a trained one of its size is worth.

Tokens per second are those of the rates and not of the rounds' luck: one and the sum of the rates
for each round. What comes out is no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from halfbyte.engine import Drafting, Engine, ModelDrafter, SyntheticVerdict
from halfbyte.evals.bench import Row, row_of, token
from halfbyte.models.decoder import Decoder
from halfbyte.models.drafter import DraftModel
from halfbyte.specs import KVType, Request, SamplingParams

WARM_UP = 4  # rounds


def speculate(
    decoder: Decoder,
    drafter: DraftModel,
    rates: Sequence[float],
    *,
    depth: int = 0,
    rounds: int = 64,
    repeats: int = 3,
    kv: KVType = "bf16",
) -> Row:
    """`repeats` runs of `rounds` rounds of `len(rates)` drafts; its seconds are those of a round.

    `rates[i]` is how often draft `i` is accepted, of all rounds. Raises `InvalidInputError` for
    rates that rise, and where the model's context is too short.
    """
    vocab = decoder.spec.vocab
    prompt = tuple(token(position, vocab) for position in range(max(depth, 1)))
    engine = Engine(
        decoder,
        context=len(prompt) + (WARM_UP + rounds * repeats) * (len(rates) + 1),
        kv=kv,
        drafting=Drafting(
            drafters=(ModelDrafter(drafter),), length=len(rates), verdict=SyntheticVerdict(rates)
        ),
    )
    engine.add(Request(prompt_ids=prompt, sampling=SamplingParams(temperature=0.0)))
    while not engine.step():
        pass  # the prompt
    _seconds(engine, WARM_UP)
    times = [_seconds(engine, rounds) for _ in range(repeats)]
    engine.close()
    return row_of(f"speculate@{depth}", 1 + sum(rates), times)


def _seconds(engine: Engine, rounds: int) -> float:
    """Of one of so many rounds."""
    start = perf_counter()
    for _ in range(rounds):
        engine.step()
    return (perf_counter() - start) / rounds
