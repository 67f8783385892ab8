"""Adapters: the decoder equals PEFT, on every kind of linear, alone, in company and on 4 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, oracle_logits, relative_error, source_of
from peft import LoraConfig, PeftModel, get_peft_model

from halfbyte.engine import Engine
from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.formats import lora
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.kernels.choice import choose
from halfbyte.kernels.contract import Linear, LowRank, Rows, Span
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.specs import SCHEMES, Request, SamplingParams, recipe_of

LENGTH = 60
IDS = [int(token) for token in np.random.default_rng(3).integers(0, 128, LENGTH)]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "everything": {"r": 3, "lora_alpha": 5, "target_modules": [*ATTENTION, *MLP]},
    "rslora": {"r": 9, "lora_alpha": 7, "use_rslora": True, "target_modules": MLP},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "regex": {"r": 2, "lora_alpha": 3, "target_modules": r".*\.1\..*(q|down)_proj"},
    "one-layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "without": {"r": 4, "target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 7, "layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {r"layers\.0.self_attn.q_proj": 11, "^model.layers.1.mlp.down_proj": 1},
    },
}


def saved(base: str, settings: dict[str, Any], path: Path, *, seed: int = 1) -> PeftModel:
    """PEFT's model, with random A and B, and its adapter in a directory."""
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, **settings)
    model = get_peft_model(oracle(CONFIGS[base]), config).eval()
    model.save_pretrained(str(path))
    return model


def decoder_of(base: str, recipe: str = "f32", **paths: Path) -> Decoder:
    source = source_of(oracle(CONFIGS[base]), CONFIGS[base], recipe)
    adapters = {name: lora.read(path, source.spec) for name, path in paths.items()}
    return load(source, ReferenceOps(), adapters=adapters)


def logits_of(decoder: Decoder, adapter: str | None, chunk: int = LENGTH) -> np.ndarray:
    shape = CacheShape(pages=1, page_len=LENGTH, ring_slack=LENGTH, kind="f32")
    cache, slot = decoder.new_cache(shape), Slot(pages=[0])
    return np.concatenate(
        [
            decoder.forward(
                [Chunk(slot=slot, token_ids=IDS[at : at + chunk], wanted="all", adapter=adapter)],
                cache,
            )
            for at in range(0, LENGTH, chunk)
        ]
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma4-unified"])
def test_equals_peft(base: str, name: str, tmp_path: Path) -> None:
    model = saved(base, SETTINGS[name], tmp_path)
    theirs = oracle_logits(model, IDS)  # type: ignore[arg-type]
    decoder = decoder_of(base, it=tmp_path)
    assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4
    assert relative_error(logits_of(decoder, None), theirs) > 1e-3


@pytest.mark.parametrize("base", ["llama-biases", "gemma3", "gemma4-everything", "qwen2"])
def test_every_linear_of_every_family_equals_peft(base: str, tmp_path: Path) -> None:
    model = saved(base, SETTINGS["all-linear"], tmp_path)
    theirs = oracle_logits(model, IDS)  # type: ignore[arg-type]
    assert relative_error(logits_of(decoder_of(base, it=tmp_path), "it"), theirs) < 1e-4


def test_a_scale_multiplies_the_whole_adapter(tmp_path: Path) -> None:
    settings = SETTINGS["patterns"]
    saved("llama", settings, tmp_path / "plain")
    alphas = {key: value * 0.25 for key, value in settings["alpha_pattern"].items()}
    quieter = {**settings, "lora_alpha": 1, "alpha_pattern": alphas}
    theirs = oracle_logits(saved("llama", quieter, tmp_path / "quiet"), IDS)  # type: ignore[arg-type]
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"])
    adapter = lora.read(tmp_path / "plain", source.spec, scale=0.25)
    decoder = load(source, ReferenceOps(), adapters={"it": adapter})
    assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of different ranks on different linears."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("attention", "rslora", "regex")):
        saved("gemma4-unified", SETTINGS[name], root / name, seed=seed)
    return {name: root / name for name in ("attention", "rslora", "regex")}


def test_loaded_together_each_is_as_if_alone(three: dict[str, Path]) -> None:
    together = decoder_of("gemma4-unified", **three)
    plain = decoder_of("gemma4-unified")
    assert np.array_equal(logits_of(together, None), logits_of(plain, None))
    for name, path in three.items():
        alone = decoder_of("gemma4-unified", **{name: path})
        assert np.array_equal(logits_of(together, name), logits_of(alone, name))


def test_a_row_does_not_depend_on_chunks_or_company(three: dict[str, Path]) -> None:
    decoder = decoder_of("gemma4-unified", **three)
    names = ["attention", None, "rslora", "regex", "attention"]
    shape = CacheShape(pages=5, page_len=LENGTH, rings=5, ring_slack=LENGTH, kind="f32")
    cache = decoder.new_cache(shape)
    slots = [Slot(pages=[index], ring=index) for index in range(5)]
    parts: list[list[np.ndarray]] = [[] for _ in names]
    for start in range(0, LENGTH, 12):
        chunks = [
            Chunk(slot=slot, token_ids=IDS[start : start + 12], wanted="all", adapter=name)
            for slot, name in zip(slots, names, strict=True)
        ]
        logits = decoder.forward(chunks, cache).reshape(5, 12, -1)
        for part, rows in zip(parts, logits, strict=True):
            part.append(rows.copy())
    for name, part in zip(names, parts, strict=True):
        for chunk in (1, 7, LENGTH):
            assert np.array_equal(np.concatenate(part), logits_of(decoder, name, chunk))


@pytest.mark.parametrize("max_sequences", [1, 4])
def test_requests_switch_between_adapters(three: dict[str, Path], max_sequences: int) -> None:
    """Each request's tokens are those of a decoder that knows its adapter alone."""
    engine = Engine(
        decoder_of("gemma4-unified", **three), context=64, max_sequences=max_sequences, kv="f32"
    )
    names = [None, "rslora", "attention", None, "regex", "rslora"]
    batch = [
        Request(
            prompt_ids=tuple(IDS[: 5 + index]),
            sampling=SamplingParams(temperature=1.5, seed=index),
            max_tokens=12,
            adapter=name,
        )
        for index, name in enumerate(names)
    ]
    tokens = [completion.token_ids for completion in engine.generate(batch)]
    for request, chosen in zip(batch, tokens, strict=True):
        own = {} if request.adapter is None else {request.adapter: three[request.adapter]}
        alone = Engine(decoder_of("gemma4-unified", **own), context=64, kv="f32")
        assert alone.generate([request])[0].token_ids == chosen
    plain = Engine(decoder_of("gemma4-unified"), context=64, kv="f32")
    other = plain.generate([replace(request, adapter=None) for request in batch])
    assert [o.token_ids != t for o, t in zip(other, tokens, strict=True)] == [
        name is not None for name in names
    ]


def test_a_request_for_an_unknown_adapter_is_refused(three: dict[str, Path]) -> None:
    engine = Engine(decoder_of("gemma4-unified", **three), context=64)
    with pytest.raises(InvalidInputError, match="'other'") as caught:
        engine.add(Request(prompt_ids=(1,), adapter="other"))
    assert caught.value.hint == "loaded: attention, rslora, regex"
    assert not engine.busy


@pytest.mark.parametrize("base", ["llama", "gemma4-unified"])
def test_on_four_bits_it_is_the_quantized_weight_plus_the_update(base: str, tmp_path: Path) -> None:
    saved(base, SETTINGS["everything"], tmp_path)
    body = source_of(oracle(CONFIGS[base]), CONFIGS[base], "q4_0")
    adapter = lora.read(tmp_path, body.spec)
    merged = {tensor.name: decode(body.tensor(tensor.name)) for tensor in body.spec.tensors()}
    for module, update in adapter.updates.items():
        a, b = map(decode, adapter.tensors(module))
        merged[update.weight] = merged[update.weight] + update.scale * (b @ a)
    reference = load(MemorySource(body.spec, merged, recipe_of("f32")), ReferenceOps())
    decoder = load(body, ReferenceOps(), adapters={"it": adapter})
    assert relative_error(logits_of(decoder, "it"), logits_of(reference, None)) < 1e-4


@pytest.mark.parametrize("base", ["llama", "gemma4-unified"])
def test_on_a_gguf_whatever_the_order_of_its_rows(base: str, tmp_path: Path) -> None:
    theirs = oracle_logits(saved(base, SETTINGS["everything"], tmp_path), IDS)  # type: ignore[arg-type]
    write_gguf(source_of(oracle(CONFIGS[base]), CONFIGS[base]), tmp_path / "base.gguf")
    source = read(tmp_path / "base.gguf")
    adapters = {"it": lora.read(tmp_path, source.spec)}
    decoder = load(source, ReferenceOps(), adapters=adapters)
    assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4


@pytest.mark.parametrize("activations", ["q8_0", "bf16"])
def test_the_update_itself_is_not_rounded(activations: Any) -> None:
    """However the body rounds its inputs, what is added is the exact product of the exact ones."""
    generator = torch.Generator().manual_seed(0)
    w, a, b, e = (
        torch.randn(shape, generator=generator) for shape in ((64, 64), (4, 64), (64, 4), (9, 64))
    )
    ops = ReferenceOps(activations=activations)
    weight, table = (ops.pack(encode(t, SCHEMES["q8_0"])) for t in (w, e))
    low, high = (ops.pack(encode(t, SCHEMES["f32"])) for t in (a, b))
    linear = Linear(weight=weight, updates=(LowRank(a=low, b=high, scale=0.5),))
    step = ops.step(lambda rows, _: [ops.linear(ops.embed(rows, table, 1.0), linear)])
    ids = list(range(9))
    with_it, without = (
        step(
            Rows(token_ids=ids, spans=[Span(start=0, count=9, pages=[0], ring=0, adapter=who)]), ()
        )[0]
        for who in (0, None)
    )
    x = ops.embed(Rows(token_ids=ids, spans=[]), table, 1.0)
    exact = (0.5 * (x @ a.T) @ b.T).numpy()
    assert relative_error(with_it - without, exact) < 1e-5


def test_adapter_bytes_are_counted_before_anything_is_loaded(tmp_path: Path) -> None:
    saved("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]}, tmp_path)
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"])
    adapter = lora.read(tmp_path, source.spec)
    numbers = 2 * 4 * ((64 + 64) + (96 + 64))  # layers x rank x (inputs + outputs)
    assert adapter.nbytes == adapter.stored.nbytes == 4 * numbers
    ops = ReferenceOps()
    bare = load(source, ReferenceOps()).ops.packed_bytes
    decoder = load(source, ops, adapters={"it": adapter})
    # The reference keeps what it packs, and its decoded form, as it does for the body.
    assert decoder.adapter_bytes == ops.packed_bytes - bare == 2 * adapter.nbytes


def test_the_native_op_set_refuses_and_the_reference_is_chosen(tmp_path: Path) -> None:
    saved("llama", SETTINGS["rslora"], tmp_path)
    source = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"])
    assert choose(source.spec, "cpu", adapters=True).name == "reference"
    if instruction_set() is None:
        pytest.skip("the native op set is not built")
    assert choose(source.spec, "cpu").name != "reference"
    ops = CPUOps(threads=1)
    decoder = load(source, ops, adapters={"it": lora.read(tmp_path, source.spec)})
    with pytest.raises(UnsupportedError, match="adapters"):
        decoder.new_cache(CacheShape(pages=1))
