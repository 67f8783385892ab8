"""The proof on real models: with every kind of drafter the tokens are those of plain decoding.

Greedy, sampled, with penalties and with ids that may not be said; alone and in company; every kind
of cache; both op sets. The run of many tokens is marked slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_files import tensors_of, write_adapter
from drafters import FunctionDrafter, Next, at_random
from oracle import CONFIGS, oracle, source_of
from random_drafters import random_drafter

from halfbyte.engine import (
    Completion,
    Drafting,
    Engine,
    LookupDrafter,
    ModelDrafter,
)
from halfbyte.formats.checkpoint import read
from halfbyte.formats.lora import open_adapter
from halfbyte.kernels.contract import KVType, OpSet
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load, load_drafter
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import Request, SamplingParams, recipe_of

OPS: dict[str, Callable[[], OpSet]] = {"reference": ReferenceOps}
if instruction_set() is not None:
    OPS["native"] = lambda: CPUOps(threads=1)
CONTEXT = 300


def load_model(path: Path, ops: OpSet) -> Decoder:
    return load(Quantized(read(path), recipe_of("q8_0")), ops)


def model_on(ops: str, model: str) -> object:
    """The reference takes its time with the larger one."""
    slow = [pytest.mark.slow] if (ops, model) == ("reference", "tiny_gemma4") else []
    return pytest.param((ops, model), id=f"{model}-{ops}", marks=slow)


@pytest.fixture(
    scope="module", params=[model_on(o, m) for o in OPS for m in ("stories260k", "tiny_gemma4")]
)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    ops, model = request.param
    return load_model(request.getfixturevalue(model), OPS[ops]())


def requests(vocab: int, count: int = 4, tokens: int = 30) -> list[Request]:
    """Prompts of several lengths, one of which repeats itself; every way to choose a token."""
    random = np.random.default_rng(3)
    samplings = (
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1),
        SamplingParams(temperature=0, repetition_penalty=1.3),
        # Four ids that may be said: a text that repeats itself.
        SamplingParams(
            temperature=1.2, seed=2, suppress=frozenset({*range(vocab)} - {7, 8, 9, 11})
        ),
    )
    made: list[Request] = []
    for index in range(count):
        ids = random.integers(3, vocab, (1, 9, 30, 170)[index % 4]).tolist()
        made.append(
            Request(
                prompt_ids=tuple(ids * 2 if index % 2 else ids)[: CONTEXT - tokens],
                sampling=samplings[index % len(samplings)],
                max_tokens=tokens,
                stop_ids=frozenset({5}),
                sequence=index,
            )
        )
    return made


def told(completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], str]]:
    return [(done.token_ids, done.finish_reason) for done in completions]


def truth(plain: Sequence[Completion], batch: Sequence[Request]) -> Next:
    """What comes next, as plain decoding said it."""
    said = {request: done.token_ids for request, done in zip(batch, plain, strict=True)}

    def following(sequence, drafts) -> int:
        place = len(sequence.ids) + len(drafts) - len(sequence.request.prompt_ids)
        answer = said[sequence.request]
        return answer[place] if place < len(answer) else 5

    return following


def draftings(decoder: Decoder, plain: Sequence[Completion], batch: Sequence[Request]):
    """Every kind of drafter, at fixed lengths and left to themselves."""
    right, vocab = truth(plain, batch), decoder.spec.vocab
    model = load_drafter(random_drafter(decoder.spec), decoder)
    yield Drafting(drafters=(FunctionDrafter(right),), length=5)
    yield Drafting(drafters=(FunctionDrafter(lambda s, d: (right(s, d) + 1) % vocab),), length=3)
    yield Drafting(drafters=(FunctionDrafter(at_random(vocab, chance=0.7, truth=right)),))
    yield Drafting(drafters=(LookupDrafter(),), length=4)
    yield Drafting(drafters=(ModelDrafter(model),), length=3)
    yield Drafting(drafters=(LookupDrafter(), ModelDrafter(model)))


def test_every_drafter_leaves_every_token_as_it_is(decoder: Decoder) -> None:
    batch = requests(decoder.spec.vocab)
    plain = Engine(decoder, context=CONTEXT).generate(batch)
    assert {done.finish_reason for done in plain} >= {"length"}
    for drafting in draftings(decoder, plain, batch):
        engine = Engine(
            decoder, context=CONTEXT, max_sequences=3, prefill_chunk=50, drafting=drafting
        )
        drafted = engine.generate(batch)
        assert told(drafted) == told(plain), drafting
        proposed = sum(done.draft.proposed for done in drafted if done.draft)
        assert proposed or drafting.length is None, drafting
        engine.check_integrity()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kv", ["f32", "bf16", "q8_0"])
def test_rings_and_every_kind_of_cache(kv: KVType, ops: str) -> None:
    """Windows of 24 in rings that wrap many times, heads of 32."""
    config = {**CONFIGS["gemma4-unified"], "head_dim": 32}
    decoder = load(source_of(oracle(config), config), OPS[ops]())
    batch = requests(decoder.spec.vocab, count=2, tokens=60)
    plain = Engine(decoder, context=CONTEXT, kv=kv).generate(batch)
    for drafting in draftings(decoder, plain, batch):
        engine = Engine(
            decoder, context=CONTEXT, kv=kv, max_sequences=2, prefill_chunk=8, drafting=drafting
        )
        assert told(engine.generate(batch)) == told(plain), drafting


@pytest.mark.parametrize("ops", OPS)
def test_adapters_are_drafted_for_like_the_model_itself(ops: str, tmp_path: Path) -> None:
    config = CONFIGS["llama"]
    source = source_of(oracle(config), config)
    shapes = {f"model.layers.{i}.self_attn.q_proj": (64, 64) for i in range(2)}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 64, "target_modules": ["q_proj"]}
    write_adapter(tmp_path, tensors_of(shapes), {**settings, "bias": "none"})
    decoder = load(source, OPS[ops](), adapters={"a": open_adapter(str(tmp_path), source.spec)})
    batch = [replace(it, adapter=who) for it in requests(128, count=3) for who in ("a", None)]
    plain = Engine(decoder, context=CONTEXT).generate(batch)
    assert plain[0].token_ids != plain[1].token_ids
    for drafting in draftings(decoder, plain, batch):
        engine = Engine(decoder, context=CONTEXT, max_sequences=4, drafting=drafting)
        assert told(engine.generate(batch)) == told(plain), drafting


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("model", ["stories260k", "tiny_gemma4"])
def test_many_tokens(model: str, ops: str, request: pytest.FixtureRequest) -> None:
    """At least 50,000 tokens on each model and op set, with each kind of drafter."""
    decoder = load_model(request.getfixturevalue(model), OPS[ops]())
    batch = [
        replace(it, sequence=index, stop_ids=frozenset())
        for index, it in enumerate(requests(decoder.spec.vocab, count=80, tokens=105))
    ]
    plain = Engine(decoder, context=CONTEXT, max_sequences=8).generate(batch)
    compared = 0
    for drafting in draftings(decoder, plain, batch):
        engine = Engine(decoder, context=CONTEXT, max_sequences=8, drafting=drafting)
        assert told(engine.generate(batch)) == told(plain), drafting
        compared += sum(len(done.token_ids) for done in plain)
    assert compared >= 50_000
