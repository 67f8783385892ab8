"""Real models through the engine: alone, in any batch and in any chunks the tokens are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from halfbyte.engine import Engine, sample
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load
from halfbyte.specs import Request, SamplingParams

CONTEXT = 160


@pytest.fixture(scope="module", params=["stories260k", "tiny_gemma4"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    path: Path = request.getfixturevalue(request.param)
    return load(read(path), ReferenceOps())


def requests(vocab: int) -> list[Request]:
    """Prompts from one token to two thirds of the context; greedy, filtered and penalised."""
    random = np.random.default_rng(1)
    samplings = (
        SamplingParams(temperature=0),
        SamplingParams(top_k=64, top_p=0.95, seed=1),
        SamplingParams(temperature=0.7, repetition_penalty=1.2, seed=2),
    )
    return [
        Request(
            prompt_ids=tuple(random.integers(0, vocab, length).tolist()),
            sampling=samplings[index % 3],
            max_tokens=12,
        )
        for index, length in enumerate((1, 30, 100, 7))
    ]


def naive(decoder: Decoder, request: Request) -> tuple[int, ...]:
    """Every token from a forward of its own, over all ids so far and an empty cache."""
    cache = decoder.new_cache(CacheShape(pages=1, page_len=CONTEXT, ring_slack=CONTEXT, kind="f32"))
    ids = list(request.prompt_ids)
    for _ in range(request.max_tokens or 0):
        (row,) = decoder.forward([Chunk(slot=Slot(pages=[0]), token_ids=ids)], cache)
        ids.append(sample(row, request.sampling, sequence=0, position=len(ids), history=ids))
    return tuple(ids[len(request.prompt_ids) :])


@pytest.mark.parametrize("options", [(1, 512), (4, 512), (3, 11)])
def test_any_batch_equals_the_naive_loop(decoder: Decoder, options: tuple[int, int]):
    max_sequences, prefill_chunk = options
    engine = Engine(
        decoder,
        context=CONTEXT,
        max_sequences=max_sequences,
        prefill_chunk=prefill_chunk,
        kv="f32",
    )
    batch = requests(decoder.spec.vocab)
    tokens = [completion.token_ids for completion in engine.generate(batch)]
    assert tokens == [naive(decoder, request) for request in batch]
    engine.check_integrity()


def test_the_context_can_be_filled_to_its_last_position(decoder: Decoder):
    request = Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(seed=3))
    whole = Engine(decoder, context=70, prefill_chunk=1).generate([request])[0]
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == 70 - 3 + 1
    again = Request(prompt_ids=(1, 2, 3, *whole.token_ids[:-1]), sampling=SamplingParams(seed=3))
    assert Engine(decoder, context=70).generate([again])[0].token_ids == whole.token_ids[-1:]
