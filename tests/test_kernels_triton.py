"""Twins and laws of Triton's op set: the reference's results, the same bits in any company.

On a CPU the kernels run in Triton's interpreter, where a program costs milliseconds: shapes are
small here. With a CUDA device the same tests run on it, and `test_kernels_cuda.py` goes further.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import DEVICE
from native_steps import random_weight, rows_of
from oracle import CONFIGS, oracle, relative_error, source_of
from random_drafters import random_drafter

from halfbyte.engine import Engine
from halfbyte.engine.drafters import margin
from halfbyte.engine.sampling import sample
from halfbyte.errors import UnsupportedError
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.contract import Choosing, Draw, KVLayout, Linear, OpSet, Rows
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.triton import TritonOps
from halfbyte.kernels.triton.device import Device
from halfbyte.kernels.triton.layout import ALIGN, FORMATS, layout_of
from halfbyte.kernels.triton.program import bucket, usual
from halfbyte.kernels.triton.step import TritonStep
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load, load_drafter
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, Request, SamplingParams, recipe_of
from halfbyte.text.tokenizer import Tokenizer

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 96)]
# Every family once, where something differs: what is left over is `slow`.
EVERYTHING = ("llama-biases", "gemma4-unified", "gemma4-everything")
# Sums of bf16 products in another order than torch's.
BF16 = 2e-2


def ops_of(operands: str = "f32") -> TritonOps:
    return TritonOps(Device(DEVICE), operands=operands)  # type: ignore[arg-type]


def stored(scheme: str, rows: int, width: int, seed: int = 0) -> QTensor:
    """A weight of a normal distribution, or of random codes where there is no encoder."""
    if scheme in ("q4_k", "q5_k"):
        return random_weight(scheme, rows, width, seed)
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return encode(weight, SCHEMES[scheme])


def random_bytes(scheme: str, rows: int, width: int) -> QTensor:
    kind = SCHEMES[scheme]
    numbers = np.random.default_rng(0)
    data = numbers.integers(0, 256, (rows, kind.row_bytes(width)), dtype=np.uint8)
    return QTensor(kind, (rows, width), data)


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (37, 3), (130, 4)])
def test_packing_is_reversible(scheme: str, rows: int, blocks: int) -> None:
    q = random_bytes(scheme, rows, blocks * max(32, SCHEMES[scheme].block))
    ops = ops_of()
    packed = ops.pack(q)
    again = ops.unpack(packed)
    assert again.scheme == q.scheme and again.shape == q.shape
    assert np.array_equal(again.data, q.data)
    assert packed.data.numel() == ops.packed_bytes == packed.layout.nbytes
    assert all(offset % ALIGN == 0 for offset in packed.layout.offsets().values())


def test_padding_is_counted_and_small_where_it_can_be() -> None:
    for scheme, shape, added in (
        ("q4_0", (4096, 3840), 0),
        ("q6_k", (262144, 3840), 0),
        ("q4_k", (4096, 3840), 4096 * 15 * 4),
        ("q5_k", (4096, 3840), 4096 * 15 * 4),
        ("q8_0", (64, 96), 64 * 34),
        ("q4_0", (65, 64), 63 * 36),
    ):
        size = layout_of(SCHEMES[scheme], shape).nbytes
        assert size - SCHEMES[scheme].bytes(shape) == added


def test_a_vector_and_a_stack_come_back() -> None:
    ops = ops_of()
    vector = stored("f32", 1, 33)
    vector = QTensor(vector.scheme, (33,), vector.data)
    stack = stored("q4_0", 6, 64)
    stack = QTensor(stack.scheme, (3, 2, 64), stack.data)
    for q in (vector, stack):
        again = ops.unpack(ops.pack(q))
        assert again.shape == q.shape and np.array_equal(again.data, q.data)


def product(ops: OpSet, q: QTensor, x: np.ndarray) -> np.ndarray:
    """`x @ q.T`: the rows of x are those of an embedding table in f32."""
    table, weight = ops.pack(encode(torch.from_numpy(x), SCHEMES["f32"])), ops.pack(q)

    def graph(rows: Rows, wanted: Sequence[int]) -> Any:
        chosen = ops.select(ops.embed(rows, table, 1.0), wanted)
        return [ops.linear(chosen, Linear(weight=weight))]

    return np.array(ops.step(graph)(rows_of(range(len(x))), range(len(x)))[0])


@pytest.mark.parametrize(
    ("scheme", "operands"),
    [*((scheme, "f32") for scheme in FORMATS), ("f32", "bf16"), ("q4_0", "bf16"), ("q6_k", "bf16")],
)
def test_a_product_equals_the_reference(scheme: str, operands: str) -> None:
    block = SCHEMES[scheme].block
    width = 1024 if scheme == "q4_0" else 96 if block <= 32 else block
    q = stored(scheme, 70, width)
    x = np.random.default_rng(1).standard_normal((2, width), dtype=np.float32)
    x[0] *= 1e4
    x[1, 7] = 3e3  # one outlier
    theirs = product(ReferenceOps(activations=operands), q, x)  # type: ignore[arg-type]
    ours = product(ops_of(operands), q, x)
    scale = np.abs(x).max(1, keepdims=True) * np.abs(decode(q).numpy()).max() * width**0.5
    assert (np.abs(ours - theirs) <= 1e-6 * scale).all()


@pytest.mark.parametrize("scheme", ["q4_0", pytest.param("q6_k", marks=pytest.mark.slow)])
def test_a_product_has_the_same_bits_for_any_number_of_rows(scheme: str) -> None:
    """Also where a few rows spread the pieces of a sum and many do not."""
    q = stored(scheme, 70, 1024)
    x = np.random.default_rng(2).standard_normal((20, 1024), dtype=np.float32)
    whole = product(ops_of("bf16"), q, x)
    for count in (1, 5):
        assert np.array_equal(product(ops_of("bf16"), q, x[:count]), whole[:count])


def run(decoder: Decoder, sizes: Sequence[int], *, kind: Any = "f32") -> np.ndarray:
    """Logits of `IDS`, fed in chunks of the given sizes."""
    cache = decoder.new_cache(CacheShape(pages=2, ring_slack=sum(sizes), kind=kind))
    slot = Slot(pages=[1, 0])
    parts = []
    for size in sizes:
        ids = IDS[slot.length : slot.length + size]
        logits = decoder.forward([Chunk(slot=slot, token_ids=ids, wanted="all")], cache)
        parts.append(logits.copy())
    return np.concatenate(parts)


def check_model(name: str, sizes: Sequence[int]) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name])
    theirs = run(load(source, ReferenceOps()), [sum(sizes)])
    assert relative_error(run(load(source, ops_of()), sizes), theirs) < 3e-5


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_model_equals_the_reference(name: str) -> None:
    check_model(name, [2, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in EVERYTHING])
def test_every_other_model_equals_the_reference(name: str) -> None:
    """Beyond the windows, and with more rows than share a pass."""
    check_model(name, [30, 1, 3])


def test_bf16_operands_are_those_of_the_reference() -> None:
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"], recipe="q4_0")
    theirs = run(load(source, ReferenceOps(activations="bf16")), [5])
    exact = run(load(source, ReferenceOps()), [5])
    ours = run(load(source, ops_of("bf16")), [4, 1])
    assert relative_error(ours, theirs) < BF16
    assert relative_error(ours, exact) < BF16


def test_a_row_does_not_depend_on_chunks_pages_or_company() -> None:
    source = source_of(oracle(CONFIGS["gemma4-unified"]), CONFIGS["gemma4-unified"], recipe="q4_0")
    decoder = load(source, ops_of("bf16"))
    alone = run(decoder, [6], kind="bf16")
    cache = decoder.new_cache(CacheShape(pages=6, rings=3, ring_slack=40, kind="bf16"))
    slots = [Slot(pages=[5, 1], ring=1), Slot(pages=[0, 4], ring=2)]
    together = []
    for start in range(0, 6, 3):
        chunks = [
            Chunk(slot=slots[0], token_ids=IDS[start : start + 1], wanted="none"),
            Chunk(slot=slots[1], token_ids=IDS[start : start + 3], wanted="all"),
        ]
        together.append(decoder.forward(chunks, cache).copy())
    assert np.array_equal(alone, np.concatenate(together))


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma4-experts", marks=pytest.mark.slow)])
def test_a_step_of_no_rows_changes_nothing(name: str) -> None:
    """By such steps kernels are compiled and graphs recorded."""
    decoder = load(source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe="q4_0"), ops_of("bf16"))
    slot, cache = Slot(pages=[0]), decoder.new_cache(CacheShape(pages=1, ring_slack=8))
    found: list[np.ndarray] = []
    for ids in (IDS[:2], IDS[2:3]):
        assert isinstance(cache.step, TritonStep)
        for shape in usual(bucket(2, 2, 1, 64)):
            cache.step.idle(shape)
        found.append(decoder.forward([Chunk(slot=slot, token_ids=ids)], cache).copy())
    assert np.array_equal(np.concatenate(found), run(decoder, [2, 1], kind="bf16")[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "gemma4-experts"])
def test_a_row_does_not_depend_on_chunks(name: str) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe="q4_0")
    decoder = load(source, ops_of("bf16"))
    whole = run(decoder, [40], kind="bf16")
    assert np.array_equal(whole, run(decoder, [17, 1, 2, 20], kind="bf16"))


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_every_kind_of_cache_equals_the_reference(kind: str) -> None:
    config = {**CONFIGS["llama"], "head_dim": 64, "num_key_value_heads": 1, "num_hidden_layers": 1}
    source = source_of(oracle(config), config)
    theirs = run(load(source, ReferenceOps()), [6], kind=kind)
    ours = run(load(source, ops_of()), [5, 1], kind=kind)
    assert relative_error(ours, theirs) < {"bf16": 2e-3, "q8_0": 5e-3}[kind]


def test_cells_that_cannot_be_are_refused() -> None:
    odd = KVLayout(num_cells=64, stride=64, sliding=False, kv_heads=1, head_dim=96, kind="q8_0")
    with pytest.raises(UnsupportedError, match="head dim"):
        ops_of().new_kv(odd)
    short = KVLayout(num_cells=48, stride=48, sliding=False, kv_heads=1, head_dim=64, kind="bf16")
    with pytest.raises(UnsupportedError, match="64 at a time"):
        ops_of().new_kv(short)


SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(seed=2**40 + 5),
    SamplingParams(temperature=0.7, top_k=5, seed=3),
    SamplingParams(temperature=1.3, top_p=0.6, seed=4),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.05, seed=5),
    SamplingParams(temperature=0, suppress=frozenset({1, 4000})),
    SamplingParams(min_p=0.3, seed=7),
    SamplingParams(top_k=1, temperature=2.0),
]


def test_tokens_chosen_on_the_device_are_those_of_the_host() -> None:
    """Every filter, rows of two blocks, and equal logits at the border of top-k."""
    numbers = np.random.default_rng(0)
    logits = (3 * numbers.standard_normal((len(SAMPLINGS), 4100))).astype(np.float32)
    logits[:, 1:4000:3] = np.round(logits[:, 1:4000:3])  # many are equal
    logits[0, [7, 4050]] = logits[5, [1, 4000]] = 50.0
    ops = ops_of()
    table = ops.pack(encode(torch.from_numpy(logits), SCHEMES["f32"]))
    step = ops.step(lambda rows, wanted: [ops.select(ops.embed(rows, table, 1.0), wanted)])
    draws = [
        Draw(sampling=params, sequence=2**33 + 1, position=17 + row)
        for row, params in enumerate(SAMPLINGS)
    ]
    assert isinstance(step, Choosing) and step.able(draws)
    count = len(logits)
    found = step.choose(rows_of(range(count)), range(count), draws, states=False)
    taken = [[*draw.sampling.suppress] for draw in draws]
    for row, gone in zip(logits, taken, strict=True):
        row[gone] = -np.inf
    assert [*map(float, found.margins)] == [*map(margin, logits)]
    assert found.tokens == [
        sample(row, draw.sampling, sequence=draw.sequence, position=draw.position, history=())
        for row, draw in zip(logits, draws, strict=True)
    ]
    penalty = SamplingParams(repetition_penalty=1.1)
    assert not step.able([Draw(sampling=penalty, sequence=0, position=0)])


@pytest.mark.parametrize("options", [{}, {"head_rows": 48}])
def test_drafts_chosen_on_the_device_are_those_of_the_host(options: dict[str, int]) -> None:
    """Of a head whose rows are not the vocabulary only without noise, which is a token's."""
    config = {**CONFIGS["llama"], "num_hidden_layers": 1}
    source = source_of(oracle(config), config)
    target = load(source, ops_of())
    drafter = load_drafter(random_drafter(source.spec, **options), target)
    cache = target.new_cache(CacheShape(pages=2, rings=2, ring_slack=8, kind="f32"))
    slots = [Slot(pages=[0]), Slot(pages=[1], ring=1)]
    target.forward([Chunk(slot=slot, token_ids=IDS[:3]) for slot in slots], cache)
    states = np.random.default_rng(3).standard_normal((2, 64), dtype=np.float32)
    given = ([IDS[3], IDS[4]], states, slots, cache)
    logits, after = (it.copy() for it in drafter.forward(*given))
    for sampling in (SamplingParams(temperature=0), SamplingParams(seed=4)):
        draws = [Draw(sampling=sampling, sequence=row, position=4) for row in range(2)]
        found = drafter.choose(*given, draws)
        if options and sampling.temperature:
            assert found is None
            continue
        assert found is not None and found.states is not None
        assert found.tokens == [
            sample(row, sampling, sequence=draw.sequence, position=4, history=())
            for row, draw in zip(logits, draws, strict=True)
        ]
        assert [*map(float, found.margins)] == [*map(margin, logits)]
        assert np.array_equal(found.states, after)


def test_rows_that_nothing_can_be_chosen_from_are_told() -> None:
    logits = np.zeros((3, 40), np.float32)
    logits[1, 3], logits[2, 5] = np.nan, np.inf
    ops = ops_of()
    table = ops.pack(QTensor(SCHEMES["f32"], (3, 40), logits.view(np.uint8)))
    step = ops.step(lambda rows, wanted: [ops.select(ops.embed(rows, table, 1.0), wanted)])
    assert isinstance(step, Choosing)
    draws = [Draw(sampling=SamplingParams(temperature=0), sequence=0, position=0)] * 3
    assert step.choose(rows_of(range(3)), range(3), draws, states=False).tokens == [0, -1, -2]


def greedy(ops: OpSet, source: Any, prompt: str, tokens: int) -> tuple[int, ...]:
    engine = Engine(load(source, ops), context=256, prefill_chunk=64)
    request = Request(
        prompt_ids=tuple(Tokenizer(source.assets).encode_raw(prompt)),
        max_tokens=tokens,
        sampling=SamplingParams(temperature=0),
    )
    return engine.generate([request])[0].token_ids


@pytest.mark.slow
def test_stories_are_the_references(stories260k: Path) -> None:
    source = Quantized(read(stories260k), recipe_of("q4_0"))
    theirs = greedy(ReferenceOps(activations="bf16"), source, "Once upon a", 24)
    assert greedy(ops_of("bf16"), source, "Once upon a", 24) == theirs


@pytest.mark.parametrize("tokens", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_gemma_4_says_what_the_reference_says(tokens: int, tiny_gemma4: Path) -> None:
    source = Quantized(read(tiny_gemma4), recipe_of("q4_0"))
    theirs = greedy(ReferenceOps(activations="bf16"), source, "The sea", tokens)
    assert greedy(ops_of("bf16"), source, "The sea", tokens) == theirs
