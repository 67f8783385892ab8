"""Twins: the decoder equals Transformers, for every flag, in prefill and in cached decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, oracle_logits, relative_error, source_of

from halfbyte.kernels.contract import KVType, Rows, Span
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.cache import Cache, CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load

LENGTH = 80  # more than three windows of 24
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, LENGTH)]


def decoder_of(name: str, **options: object) -> tuple[Decoder, np.ndarray]:
    """Our decoder and the oracle's logits of `IDS`."""
    model = oracle(CONFIGS[name])
    source = source_of(model, CONFIGS[name])
    return load(source, ReferenceOps(**options)), oracle_logits(model, IDS)  # type: ignore[arg-type]


def cache_of(
    decoder: Decoder, *, rings: int = 1, page_len: int = 16, kind: KVType = "f32", slack: int = 80
) -> Cache:
    pages = rings * (-(-LENGTH // page_len))
    return decoder.new_cache(
        CacheShape(pages=pages, page_len=page_len, rings=rings, ring_slack=slack, kind=kind)
    )


def slot_of(cache: Cache, index: int = 0) -> Slot:
    each = cache.shape.pages // cache.shape.rings
    return Slot(pages=list(range(index * each, (index + 1) * each)), ring=index)


def run(decoder: Decoder, cache: Cache, slot: Slot, sizes: list[int]) -> np.ndarray:
    """Logits of `IDS`, fed in chunks of the given sizes."""
    parts: list[np.ndarray] = []
    for size in sizes:
        ids = IDS[slot.length : slot.length + size]
        parts.append(decoder.forward([Chunk(slot=slot, token_ids=ids, wanted="all")], cache))
    return np.concatenate(parts)


@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decoding_equal_transformers(name: str) -> None:
    decoder, theirs = decoder_of(name)
    cache = cache_of(decoder)
    prefill = run(decoder, cache, slot_of(cache), [LENGTH])
    assert relative_error(prefill, theirs) < 1e-4
    cache = cache_of(decoder, slack=40)
    decoded = run(decoder, cache, slot_of(cache), [40] + [1] * 40)
    assert relative_error(decoded, theirs) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gemma4-everything"])
@pytest.mark.parametrize("exact_rows", [True, False])
def test_both_ways_to_multiply_agree(name: str, exact_rows: bool) -> None:
    decoder, theirs = decoder_of(name, exact_rows=exact_rows)
    cache = cache_of(decoder)
    assert relative_error(run(decoder, cache, slot_of(cache), [50, 30]), theirs) < 1e-4


@pytest.mark.parametrize(
    "name",
    ["llama", "llama-odd-width", "mistral-window", "gemma4-unified", "gemma4-everything"],
)
def test_a_row_does_not_depend_on_chunks(name: str) -> None:
    decoder, _ = decoder_of(name)
    whole = None
    for sizes in ([80], [1] * 80, [17, 33, 30], [64, 1, 15], [3] * 26 + [2]):
        cache = cache_of(decoder)
        logits = run(decoder, cache, slot_of(cache), sizes)
        whole = logits if whole is None else whole
        assert np.array_equal(whole, logits), sizes


@pytest.mark.parametrize("name", ["llama3-rope", "gemma4-unified", "gemma4-everything"])
def test_a_row_does_not_depend_on_pages_ring_or_company(name: str) -> None:
    decoder, _ = decoder_of(name)
    cache = cache_of(decoder)
    alone = run(decoder, cache, slot_of(cache), [80])
    cache = cache_of(decoder, rings=3, page_len=8, slack=53)
    slots = [slot_of(cache, index) for index in range(3)]
    slots[0].pages, slots[2].pages = slots[2].pages[::-1], slots[0].pages[::-1]
    together: list[np.ndarray] = []
    for start in range(0, 80, 16):
        chunks = [
            Chunk(slot=slots[0], token_ids=IDS[start // 2 : start // 2 + 8], wanted="none"),
            Chunk(slot=slots[1], token_ids=IDS[start : start + 16], wanted="all"),
            Chunk(slot=slots[2], token_ids=IDS[start : start + 1], wanted="last"),
        ]
        logits = decoder.forward(chunks, cache)
        assert logits.shape[0] == 17
        together.append(logits[:16])
    assert np.array_equal(alone, np.concatenate(together))


@pytest.mark.parametrize("name", ["llama", "gemma4-unified", "gemma4-everything"])
def test_rolling_back_leaves_no_trace(name: str) -> None:
    decoder, _ = decoder_of(name)
    cache = cache_of(decoder)
    plain = run(decoder, cache, slot_of(cache), [80])
    cache = cache_of(decoder, slack=16)
    slot = slot_of(cache)
    logits = run(decoder, cache, slot, [16, 16, 16])
    for _ in range(4):
        wrong = [(token + 1) % 128 for token in IDS[slot.length : slot.length + 8]]
        decoder.forward([Chunk(slot=slot, token_ids=wrong, wanted="none")], cache)
        slot.rollback(8)
        logits = np.concatenate([logits, run(decoder, cache, slot, [8])])
    assert np.array_equal(logits, plain[: len(logits)])


@pytest.mark.parametrize(("kind", "bound"), [("bf16", 2e-2), ("q8_0", 2e-2)])
def test_a_rounded_cache_stays_close(kind: KVType, bound: float) -> None:
    settings = CONFIGS["llama-wide-heads"]
    model = oracle(settings)
    decoder = load(source_of(model, settings), ReferenceOps())
    cache = cache_of(decoder, kind=kind)
    error = relative_error(run(decoder, cache, slot_of(cache), [40, 40]), oracle_logits(model, IDS))
    assert 1e-5 < error < bound


def test_rounded_activations_stay_close_to_exact_ones() -> None:
    model = oracle(CONFIGS["llama"])
    source = source_of(model, CONFIGS["llama"], recipe="q8_0")
    cache_shape = CacheShape(pages=5, page_len=16, ring_slack=80, kind="f32")
    logits = []
    for activations in ("f32", "q8_0", "bf16"):
        decoder = load(source, ReferenceOps(activations=activations))  # type: ignore[arg-type]
        cache = decoder.new_cache(cache_shape)
        logits.append(run(decoder, cache, slot_of(cache), [80]))
    assert 1e-5 < relative_error(logits[1], logits[0]) < 5e-2
    assert 1e-5 < relative_error(logits[2], logits[0]) < 5e-2


@pytest.mark.parametrize("name", ["llama", "gemma4-everything"])
def test_weights_decoded_at_each_use_give_the_same_bits(name: str) -> None:
    source = source_of(oracle(CONFIGS[name]), CONFIGS[name], recipe="q4_0")
    outcomes = []
    for decoded_bytes in (0, 2**30):
        decoder = load(source, ReferenceOps(decoded_bytes=decoded_bytes))
        cache = cache_of(decoder)
        outcomes.append(run(decoder, cache, slot_of(cache), [80]))
    assert np.array_equal(*outcomes)


def test_packing_is_reversible() -> None:
    source: MemorySource = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"], recipe="q4_0")
    ops = ReferenceOps()
    for _, q in source.tensors():
        again = ops.unpack(ops.pack(q))
        assert again.scheme == q.scheme and again.shape == q.shape
        assert np.array_equal(again.data, q.data)


@pytest.mark.parametrize("name", ["gemma4-unified", "gemma4-experts", "gemma4-per-layer"])
def test_gradients_flow_through_the_whole_model(name: str) -> None:
    """The gradient of a loss with respect to the embedding equals the oracle's."""
    config = CONFIGS[name]
    model = oracle(config)
    ids = torch.tensor([IDS[:48]])
    model(ids, use_cache=False).logits.square().mean().backward()
    theirs = model.get_input_embeddings().weight.grad
    ours = embedding_gradient(source_of(model, config))
    # Transformers drops the gradient of the padding token, id 0.
    assert relative_error(ours[1:].numpy(), theirs[1:].numpy()) < 1e-4


def embedding_gradient(source: MemorySource) -> torch.Tensor:
    decoder = load(source, ReferenceOps(exact_rows=False))
    table = decoder.weights.embed.dense.requires_grad_()
    rows = Rows(token_ids=IDS[:48], spans=[Span(start=0, count=48, pages=(), ring=0)])
    caches: list[ScratchKV] = []
    for layer in decoder.spec.layers:
        caches.append(ScratchKV() if layer.kv_source is None else caches[layer.kv_source])
    decoder.logits(decoder.states(rows, caches)).square().mean().backward()
    return table.grad
