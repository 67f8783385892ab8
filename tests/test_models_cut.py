"""A model cut in two says what it says whole: on the CPU and, in the interpreter, on a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from interpreter import DEVICE
from oracle import CONFIGS, MemorySource, oracle, relative_error, source_of
from peft import LoraConfig, get_peft_model
from random_drafters import random_drafter

from halfbyte.engine import Drafting, Engine, LookupDrafter, ModelDrafter
from halfbyte.errors import InvalidInputError
from halfbyte.formats import lora
from halfbyte.formats.checkpoint import Source, read
from halfbyte.kernels.contract import Choosing, OpSet
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.relay import Front
from halfbyte.kernels.triton import TritonOps
from halfbyte.kernels.triton.device import Device
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load, load_drafter
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import Request, SamplingParams, check_cut, cuts, parted, recipe_of
from halfbyte.text.tokenizer import Tokenizer

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 60)]
EVERY = ("llama", "mistral-window", "gemma4-unified", "gemma4-experts", "gemma4-everything")
MakeOps = Callable[[], OpSet]


def native() -> OpSet:
    return CPUOps(threads=1)


def card() -> OpSet:
    return TritonOps(Device(DEVICE))


def made(name: str, recipe: str = "f32") -> MemorySource:
    return source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe)


def cut(
    source: Source, card_layers: int, front: MakeOps, back: MakeOps, **options: object
) -> Decoder:
    return load(source, back(), front=Front(front(), card_layers), **options)  # type: ignore[arg-type]


def logits(decoder: Decoder, sizes: Sequence[int], adapter: str | None = None) -> np.ndarray:
    cache = decoder.new_cache(CacheShape(pages=2, ring_slack=64, kind="f32"))
    slot, parts = Slot(pages=[1, 0]), list[np.ndarray]()
    for size in sizes:
        ids = IDS[slot.length : slot.length + size]
        chunk = Chunk(slot=slot, token_ids=ids, wanted="all", adapter=adapter)
        parts.append(decoder.forward([chunk], cache).copy())
    return np.concatenate(parts)


@pytest.mark.parametrize("name", EVERY)
def test_wherever_it_is_cut_the_bits_are_those_of_the_whole(name: str) -> None:
    """The embeddings per layer come along, and a cache that others read stays with them."""
    source = made(name, "q4_0")
    whole = logits(load(source, ReferenceOps()), [60])
    assert cuts(source.spec)
    for number in cuts(source.spec):
        decoder = cut(source, number, ReferenceOps, ReferenceOps)
        assert np.array_equal(logits(decoder, [33, 1, 4, 22]), whole)


@pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
@pytest.mark.parametrize("name", ["llama", "gemma4-everything"])
def test_the_native_op_set_in_front_is_what_its_reference_is(name: str) -> None:
    source = made(name, "q4_0")
    number = cuts(source.spec)[-1]
    rounded = cut(source, number, lambda: ReferenceOps(activations="q8_0"), ReferenceOps)
    ours = logits(cut(source, number, native, ReferenceOps), [40, 20])
    assert relative_error(ours, logits(rounded, [60])) < 1e-2
    assert np.array_equal(ours, logits(cut(source, number, native, ReferenceOps), [7, 13, 40]))


def test_adapters_go_with_the_layers_that_they_change(tmp_path: Path) -> None:
    settings = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    get_peft_model(oracle(CONFIGS["gemma4-unified"]), settings).save_pretrained(str(tmp_path))
    source = made("gemma4-unified")
    adapters = {"it": lora.read(tmp_path, source.spec)}
    whole = load(source, ReferenceOps(), adapters=adapters)
    parts = cut(source, 1, ReferenceOps, ReferenceOps, adapters=adapters)
    for adapter in ("it", None):
        assert np.array_equal(logits(parts, [60], adapter), logits(whole, [30, 30], adapter))
    assert parts.front is not None and parts.front.adapters == parts.adapters == ("it",)
    assert parts.adapter_bytes == whole.adapter_bytes > parts.front.adapter_bytes > 0


def test_only_what_both_ends_need_is_packed_twice() -> None:
    """A tied table, which the reference keeps as it is stored and decoded."""
    for name, twice in (("llama", 0), ("gemma4-unified", 2 * 4 * 128 * 64)):
        source = made(name)
        whole = load(source, ReferenceOps()).packed_bytes
        assert cut(source, 1, ReferenceOps, ReferenceOps).packed_bytes == whole + twice


def said(decoder: Decoder, prompt: Sequence[int], tokens: int, **options: object) -> list[int]:
    engine = Engine(decoder, context=128, prefill_chunk=32, **options)  # type: ignore[arg-type]
    greedy = SamplingParams(temperature=0)
    request = Request(prompt_ids=tuple(prompt), max_tokens=tokens, sampling=greedy)
    return [*engine.generate([request])[0].token_ids]


@pytest.mark.parametrize("front", [ReferenceOps, native])
def test_drafters_change_no_token_of_a_model_that_is_cut(front: MakeOps) -> None:
    """A drafter that is always wrong, and one that repeats what was said."""
    if front is native and instruction_set() is None:
        pytest.skip("no native kernels here")
    source = made("gemma4-unified", "q4_0")
    plain = said(cut(source, 2, front, ReferenceOps), IDS, 24)
    decoder = cut(source, 2, front, ReferenceOps)
    drafter = ModelDrafter(load_drafter(random_drafter(source.spec), decoder))
    drafting = Drafting(drafters=(LookupDrafter(), drafter), length=3)
    assert said(decoder, IDS, 24, drafting=drafting) == plain


def test_what_is_kept_of_a_sequence_is_kept_on_both_sides() -> None:
    """Rings of layers on either side are copied for those who begin as another did."""
    source = made("gemma4-unified", "q4_0")
    greedy = SamplingParams(temperature=0)
    requests = [
        Request(prompt_ids=tuple(IDS[:40] + more), max_tokens=6, sampling=greedy)
        for more in ([], IDS[40:], IDS[5:9])
    ]
    said_by: list[list[tuple[int, ...]]] = []
    for decoder in (load(source, ReferenceOps()), cut(source, 2, ReferenceOps, ReferenceOps)):
        engine = Engine(
            decoder, context=128, prefill_chunk=16, max_sequences=2, spare=1, keeps=True
        )
        first = engine.generate(requests[:1])
        said_by.append([done.token_ids for done in first + engine.generate(requests[1:])])
        engine.check_integrity()
    assert said_by[0] == said_by[1]


@pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
@pytest.mark.parametrize(
    ("card_layers", "tokens"),
    [(1, 2), *(pytest.param(number, 16, marks=pytest.mark.slow) for number in (1, 2, 5))],
)
def test_gemma_4_on_both_says_what_the_reference_says(
    card_layers: int, tokens: int, tiny_gemma4: Path
) -> None:
    """The CPU's kernels, then the card's: in the interpreter, or on a card."""
    source = Quantized(read(tiny_gemma4), recipe_of("q4_0"))
    prompt = Tokenizer(source.assets).encode_raw("The sea")  # type: ignore[arg-type]
    decoder = cut(source, card_layers, native, card)
    cache = decoder.new_cache(CacheShape(pages=1))
    assert isinstance(cache.step, Choosing)
    theirs = said(load(source, ReferenceOps(activations="bf16")), prompt, tokens)
    assert said(decoder, prompt, tokens) == theirs


def test_a_row_on_both_does_not_depend_on_chunks() -> None:
    """Embeddings per layer are handed over beside the states."""
    source = made("gemma4-everything", "q4_0")
    number = cuts(source.spec)[-1]
    decoder = cut(source, number, ReferenceOps, lambda: TritonOps(Device(DEVICE), operands="f32"))
    whole = logits(decoder, [5])
    theirs = cut(source, number, ReferenceOps, ReferenceOps)
    assert relative_error(whole, logits(theirs, [5])) < 1e-4
    assert np.array_equal(whole, logits(decoder, [3, 1, 1]))


def test_cuts_that_cannot_be_are_refused_with_the_reason() -> None:
    sharing = made("gemma4-everything").spec
    count, allowed = len(sharing.layers), cuts(sharing)
    assert allowed and allowed[0] > 1
    with pytest.raises(InvalidInputError, match="would read the cache of layer") as refused:
        check_cut(sharing, 1)
    assert refused.value.hint == f"give --card-layers {allowed[0]} or more"
    for number in (0, count + 1, -1):
        with pytest.raises(InvalidInputError, match=f"{number} layers on the card"):
            check_cut(sharing, number)
    check_cut(sharing, count)
    with pytest.raises(InvalidInputError, match="would read the cache"):
        cut(made("gemma4-everything"), 1, ReferenceOps, ReferenceOps)


def test_a_drafter_stays_with_the_caches_it_reads() -> None:
    tied, untied = made("gemma4-unified").spec, made("llama").spec
    assert parted(random_drafter(tied).spec, tied, 2) is None
    assert "layer 2" in (parted(random_drafter(tied).spec, tied, 1) or "")
    assert "table" in (parted(random_drafter(untied).spec, untied, 1) or "")
