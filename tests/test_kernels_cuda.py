"""On a real card: what the interpreter cannot tell. Matrix instructions, graphs, memory, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreter import DEVICE
from native_steps import random_weight
from oracle import CONFIGS, oracle, relative_error, source_of
from test_kernels_triton import BF16, greedy, ops_of, product, stored
from test_kernels_values import FULL, PROPORTIONAL, attention_of
from test_kernels_values import run as attention
from test_models_cut import cut, said

from halfbyte.formats.checkpoint import read
from halfbyte.kernels.choice import choose
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.relay import Front
from halfbyte.kernels.triton.layout import FORMATS
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import KVType, cuts, recipe_of
from halfbyte.text.tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device"),
]
LENGTH = 1300  # three pieces of attention's sum, and more rows than share a pass
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, LENGTH)]


@pytest.mark.parametrize("scheme", FORMATS)
@pytest.mark.parametrize(("rows", "width"), [(64, 3840), (2048, 1280), (333, 768)])
def test_products_equal_the_reference(scheme: str, rows: int, width: int) -> None:
    q = stored(scheme, rows, width)
    x = np.random.default_rng(1).standard_normal((300, width), dtype=np.float32)
    theirs = product(ReferenceOps(activations="bf16"), q, x)
    assert relative_error(product(ops_of("bf16"), q, x), theirs) < 1e-5


@pytest.mark.parametrize("scheme", FORMATS)
def test_a_product_has_the_same_bits_for_any_number_of_rows(scheme: str) -> None:
    """The matrix instruction treats its columns alike, however many there are."""
    q = stored(scheme, 640, 3840)
    x = np.random.default_rng(2).standard_normal((520, 3840), dtype=np.float32)
    whole = product(ops_of("bf16"), q, x)
    for count in (1, 2, 7, 16, 17, 40, 100, 300):
        assert np.array_equal(product(ops_of("bf16"), q, x[:count]), whole[:count]), count


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_attention_has_the_same_bits_in_any_chunk(dim: int, kind: KVType) -> None:
    spec = attention_of(FULL, dim)
    whole = attention(ops_of("bf16"), spec, kind=kind, values_only=False)
    parts = attention(ops_of("bf16"), spec, kind=kind, values_only=False, sizes=(1, 63, 2, 134))
    assert np.array_equal(whole, parts)
    theirs = attention(ReferenceOps(activations="bf16"), spec, kind=kind, values_only=False)
    assert relative_error(whole, theirs) < BF16


def test_keys_made_of_values_are_those_that_would_be_stored() -> None:
    spec = attention_of(PROPORTIONAL)
    kept = attention(ops_of(), spec, kind="f32", values_only=False)
    made = attention(ops_of(), spec, kind="f32", values_only=True)
    assert relative_error(made, kept) < 1e-5


def run(decoder: Decoder, sizes: Sequence[int], kind: Any = "bf16") -> np.ndarray:
    shape = CacheShape(pages=-(-LENGTH // 64), ring_slack=max(sizes), kind=kind)
    cache = decoder.new_cache(shape)
    slot = Slot(pages=[*range(shape.pages)][::-1])
    parts = []
    for size in sizes:
        ids = IDS[slot.length : slot.length + size]
        logits = decoder.forward([Chunk(slot=slot, token_ids=ids, wanted="all")], cache)
        parts.append(logits.copy())
    return np.concatenate(parts)


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "gemma4-unified", "gemma4-experts", "gemma4-per-layer"])
def test_a_model_has_the_same_bits_in_any_chunk_and_from_a_graph(name: str, kind: str) -> None:
    dims = {"head_dim": 64, "global_head_dim": 128, "max_position_embeddings": 2048}
    config = {**CONFIGS[name], **dims}
    source = source_of(oracle(config), config, recipe="q4_0")
    decoder = load(source, ops_of("bf16"))
    whole = run(decoder, [LENGTH], kind)
    pieces = [512, 1, 1, 1, 5, 5, 5, 8, 200, 500, 62]
    assert np.array_equal(whole, run(decoder, pieces, kind))


@pytest.mark.parametrize("name", ["gemma4-unified", "gemma4-everything"])
def test_a_model_cut_in_two_has_the_same_bits_in_any_chunk_and_from_a_graph(name: str) -> None:
    """The front on the CPU is no part of the graph, and hands its states over before each."""
    config = {**CONFIGS[name], "max_position_embeddings": 2048}
    source = source_of(oracle(config), config, recipe="q4_0")
    number = cuts(source.spec)[-1]
    front = Front(choose(source.spec, "cpu"), number)
    decoder = load(source, ops_of("bf16"), front=front)
    whole = run(decoder, [LENGTH])
    assert np.array_equal(whole, run(decoder, [512, 1, 1, 1, 5, 5, 5, 8, 200, 500, 62]))
    theirs = load(source, ReferenceOps(activations="bf16"), front=front)
    assert relative_error(whole[:64], run(theirs, [LENGTH])[:64]) < BF16


def test_a_card_with_some_of_the_layers_says_what_the_reference_says(tiny_gemma4: Path) -> None:
    source = Quantized(read(tiny_gemma4), recipe_of("q4_0"))
    prompt = Tokenizer(source.assets).encode_raw("The history of the sea")  # type: ignore[arg-type]
    theirs = said(load(source, ReferenceOps(activations="bf16")), prompt, 24)
    for number in cuts(source.spec):
        decoder = cut(source, number, lambda: choose(source.spec, "cpu"), ops_of)
        assert said(decoder, prompt, 24) == theirs


def test_nothing_is_allocated_once_a_step_is_prepared() -> None:
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"], recipe="q4_0")
    decoder = load(source, ops_of("bf16"))
    cache = decoder.new_cache(CacheShape(pages=4, ring_slack=64))
    cache.prepare(65, 1, 1)
    slot = Slot(pages=[0, 1, 2, 3])
    for size in (60, 1, 1, 1):
        decoder.forward([Chunk(slot=slot, token_ids=IDS[:size])], cache)
    before = torch.cuda.memory_reserved()
    for size in (40, 1, 1, 1, 1):
        decoder.forward([Chunk(slot=slot, token_ids=IDS[:size])], cache)
    assert torch.cuda.memory_reserved() == before


@pytest.mark.parametrize("recipe", ["q4_0", "q8_0", "bf16"])
def test_real_models_say_what_the_reference_says(
    recipe: str, tiny_gemma4: Path, stories260k: Path
) -> None:
    for path, prompt in ((tiny_gemma4, "The history of the sea"), (stories260k, "Once upon")):
        source = Quantized(read(path), recipe_of(recipe))
        theirs = greedy(ReferenceOps(activations="bf16"), source, prompt, 24)
        assert greedy(ops_of("bf16"), source, prompt, 24) == theirs


def test_random_bytes_come_back_from_the_card() -> None:
    for scheme in ("q4_0", "q8_0", "q6_k"):
        q = random_weight(scheme, 1000, 3840)
        ops = ops_of()
        assert np.array_equal(ops.unpack(ops.pack(q)).data, q.data)
