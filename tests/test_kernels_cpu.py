"""Twins and laws of the native op set: the reference's results, the same bits in any company."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, oracle, relative_error, source_of

from halfbyte.kernels.contract import Linear, Rows, Span
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.cpu.ops import INSTRUCTION_SETS, NATIVE, native
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import Cache, CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES

if instruction_set() is None:
    pytest.skip(
        "the native kernels are not built, or not for this machine", allow_module_level=True
    )

HERE = [name for name in INSTRUCTION_SETS if native().supports(name)]
LENGTH = 80
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, LENGTH)]


def stored(scheme: str, rows: int, width: int, seed: int = 0) -> QTensor:
    """Random weights, or random bytes with sane scales where there is no encoder."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator)
    if scheme != "q4_k":
        return encode(weight, SCHEMES[scheme])
    numbers = np.random.default_rng(seed)
    data = numbers.integers(0, 256, (rows, width // 256, 144), dtype=np.uint8)
    scales = numbers.uniform(1e-3, 1e-2, (rows, width // 256, 2)).astype(np.float16)
    data[..., :4] = scales.view(np.uint8).reshape(rows, -1, 4)
    return QTensor(SCHEMES[scheme], (rows, width), data.reshape(rows, -1))


def product(q: QTensor, x: np.ndarray, isa: str, threads: int = 1) -> np.ndarray:
    """`x @ q.T` by the native kernel: the rows of x are those of an embedding table in f32."""
    ops = CPUOps(threads=threads, instructions=isa)
    table = ops.pack(encode(torch.from_numpy(x), SCHEMES["f32"]))
    weight = ops.pack(q)

    def graph(rows: Rows, wanted: Sequence[int]) -> Any:
        x = ops.select(ops.embed(rows, table, 1.0), wanted)
        return [ops.linear(x, Linear(weight=weight))]

    rows = Rows(token_ids=range(len(x)), spans=[Span(start=0, count=len(x), pages=(0,), ring=0)])
    return np.array(ops.step(graph)(rows, range(len(x)))[0])


def rounded(x: np.ndarray) -> np.ndarray:
    """int8 per 32 with an fp16 scale, halves to even, in f64."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    values = np.rint(blocks * inverse)
    return (values.astype(np.float64) * scale.astype(np.float16)).reshape(x.shape)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("scheme", NATIVE)
@pytest.mark.parametrize(("rows", "width"), [(16, 256), (37, 512), (130, 768)])
def test_a_product_is_exact_to_f32(isa: str, scheme: str, rows: int, width: int) -> None:
    q = stored(scheme, rows, width)
    x = np.random.default_rng(1).standard_normal((5, width), dtype=np.float32)
    x[1] *= 1e4
    x[2, 7] = 3e3  # one outlier
    x[3] = 0
    x[4, :64] = 1e-30
    exact = (rounded(x) if SCHEMES[scheme].block > 1 else x.astype(np.float64)) @ decode(
        q
    ).double().numpy().T
    ours = product(q, x, isa)
    scale = np.abs(x).max(1, keepdims=True).astype(np.float64) * np.abs(decode(q).numpy()).max()
    assert (np.abs(ours - exact) <= 1e-5 * scale * width**0.5 + 1e-30).all()
    assert (ours[3] == 0).all()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("scheme", NATIVE)
def test_a_product_has_the_same_bits_for_any_number_of_rows(isa: str, scheme: str) -> None:
    q = stored(scheme, 67, 512)
    x = np.random.default_rng(2).standard_normal((70, 512), dtype=np.float32)
    alone = np.concatenate([product(q, x[i : i + 1], isa) for i in range(len(x))])
    for count in (2, 3, 5, 8, 9, 17, 70):
        assert np.array_equal(product(q, x[:count], isa, threads=3), alone[:count])


@pytest.mark.skipif("avx-vnni" not in HERE, reason="needs a processor with AVX-VNNI")
@pytest.mark.parametrize("scheme", NATIVE)
def test_avx_vnni_gives_the_bits_of_avx2(scheme: str) -> None:
    q = stored(scheme, 67, 512)
    x = np.random.default_rng(3).standard_normal((11, 512), dtype=np.float32)
    assert np.array_equal(product(q, x, "avx-vnni"), product(q, x, "avx2"))


@pytest.mark.parametrize("scheme", NATIVE)
@pytest.mark.parametrize("rows", [16, 37])
def test_packing_is_reversible(scheme: str, rows: int) -> None:
    q = stored(scheme, rows, 512)
    ops = CPUOps(threads=2)
    again = ops.unpack(ops.pack(q))
    assert again.scheme == q.scheme and again.shape == q.shape
    assert np.array_equal(again.data, q.data)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("scheme", NATIVE)
def test_embedding_rows_are_the_decoded_ones(isa: str, scheme: str) -> None:
    q = stored(scheme, 40, 512)
    ops = CPUOps(threads=1, instructions=isa)
    table = ops.pack(q)
    step = ops.step(lambda rows, wanted: [ops.select(ops.embed(rows, table, 0.5), wanted)])
    rows = Rows(token_ids=range(40), spans=[Span(start=0, count=40, pages=(0,), ring=0)])
    # Q4_K's decoding multiplies in another order: the last bit may differ.
    np.testing.assert_allclose(
        step(rows, range(40))[0], 0.5 * decode(q).numpy(), rtol=1e-6, atol=1e-8
    )


def run(decoder: Decoder, sizes: Sequence[int], *, kind: Any = "f32") -> np.ndarray:
    """Logits of `IDS`, fed in chunks of the given sizes."""
    cache = decoder.new_cache(CacheShape(pages=2, ring_slack=LENGTH, kind=kind))
    slot = Slot(pages=[1, 0])
    parts = []
    for size in sizes:
        ids = IDS[slot.length : slot.length + size]
        logits = decoder.forward([Chunk(slot=slot, token_ids=ids, wanted="all")], cache)
        parts.append(logits.copy())
    return np.concatenate(parts)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_equals_the_reference(name: str, isa: str) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name])
    theirs = run(load(source, ReferenceOps()), [LENGTH])
    ours = run(load(source, CPUOps(threads=2, instructions=isa)), [40] + [1] * 40)
    assert relative_error(ours, theirs) < 3e-5


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "gemma4-unified"])
def test_a_row_does_not_depend_on_chunks_or_threads(name: str, isa: str) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe="q4_0")
    plain = run(load(source, CPUOps(threads=1, instructions=isa)), [1] * LENGTH, kind="bf16")
    for threads, sizes in ((1, [80]), (2, [17, 33, 30]), (3, [3] * 26 + [2]), (2, [64, 1, 15])):
        decoder = load(source, CPUOps(threads=threads, instructions=isa))
        assert np.array_equal(plain, run(decoder, sizes, kind="bf16")), (threads, sizes)


@pytest.mark.parametrize("name", ["llama3-rope", "gemma4-unified"])
def test_a_row_does_not_depend_on_pages_ring_or_company(name: str) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe="q8_0")
    decoder = load(source, CPUOps(threads=2))
    alone = run(decoder, [80])
    cache = cache_of_three(decoder)
    slots = [Slot(pages=[5, 1], ring=1), Slot(pages=[0, 4], ring=2), Slot(pages=[2, 3], ring=0)]
    together = []
    for start in range(0, 80, 16):
        chunks = [
            Chunk(slot=slots[0], token_ids=IDS[start // 2 : start // 2 + 8], wanted="none"),
            Chunk(slot=slots[1], token_ids=IDS[start : start + 16], wanted="all"),
            Chunk(slot=slots[2], token_ids=IDS[start : start + 1], wanted="last"),
        ]
        together.append(decoder.forward(chunks, cache)[:16].copy())
    assert np.array_equal(alone, np.concatenate(together))


def cache_of_three(decoder: Decoder) -> Cache:
    return decoder.new_cache(CacheShape(pages=6, rings=3, ring_slack=40, kind="f32"))


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_every_kind_of_cache_equals_the_reference(kind: str, isa: str) -> None:
    config = {**CONFIGS["mistral-window"], "head_dim": 96, "num_key_value_heads": 1}
    source = source_of(oracle(config), config)
    theirs = run(load(source, ReferenceOps()), [LENGTH], kind=kind)
    ours = load(source, CPUOps(threads=2, instructions=isa))
    plain = run(ours, [LENGTH], kind=kind)
    # Rounded keys differ where a number lies half-way between two: a flip of one last bit.
    assert relative_error(plain, theirs) < {"f32": 1e-5, "bf16": 2e-3, "q8_0": 5e-3}[kind]
    assert np.array_equal(plain, run(ours, [17, 1, 1, 40, 21], kind=kind))


def test_malformed_shapes_raise_before_native_code() -> None:
    ops = CPUOps(threads=1)
    table = ops.pack(stored("f32", 16, 64))
    wrong = ops.pack(stored("q4_0", 16, 96))
    with pytest.raises(ValueError, match="does not fit"):
        ops.step(lambda rows, _: [ops.linear(ops.embed(rows, table, 1.0), Linear(weight=wrong))])
    with pytest.raises(ValueError, match="size of the shape"):
        native().Weight(native().Pool(1), 4, 16, 64, np.zeros((16, 35), np.uint8))
    step = ops.step(lambda rows, wanted: [ops.select(ops.embed(rows, table, 1.0), wanted)])
    span = Span(start=0, count=1, pages=(0,), ring=0)
    with pytest.raises(ValueError, match="token id"):
        step(Rows(token_ids=[16], spans=[span]), [0])
    with pytest.raises(ValueError, match="wanted row"):
        step(Rows(token_ids=[1], spans=[span]), [1])
    with pytest.raises(ValueError, match="cover"):
        step(Rows(token_ids=[1, 2], spans=[span]), [0])


def test_the_pool_survives_a_fork() -> None:
    q = stored("q4_0", 64, 256)
    x = np.ones((1, 256), dtype=np.float32)
    before = product(q, x, HERE[0], threads=2)
    ops = CPUOps(threads=2, instructions=HERE[0])
    ops.pack(q)  # starts the threads
    child = os.fork()
    if child == 0:
        good = np.array_equal(ops.unpack(ops.pack(q)).data, q.data)
        os._exit(0 if good else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.array_equal(before, product(q, x, HERE[0], threads=2))
