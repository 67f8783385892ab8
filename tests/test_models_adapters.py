"""Adapters: the decoder equals PEFT, on every kind of linear, alone, in company and on 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, oracle_logits, relative_error, source_of
from peft import LoraConfig, PeftModel, get_peft_model

from halfbyte.engine import Engine
from halfbyte.errors import InvalidInputError
from halfbyte.formats import lora
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.lora_writing import updates_for, write_adapter
from halfbyte.formats.merged import Merged
from halfbyte.kernels.contract import Linear, LowRank, OpSet, Rows, Span
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.cpu.ops import INSTRUCTION_SETS, native
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.specs import SCHEMES, Request, SamplingParams, recipe_of

MakeOps = Callable[[], OpSet]
HERE = [
    name for name in INSTRUCTION_SETS if instruction_set() is not None and native().supports(name)
]
OPS: dict[str, MakeOps] = {
    "reference": ReferenceOps,
    **{isa: lambda isa=isa: CPUOps(threads=2, instructions=isa) for isa in HERE},
}
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


@pytest.fixture(params=OPS)
def make_ops(request: pytest.FixtureRequest) -> MakeOps:
    return OPS[request.param]


def decoder_of(
    base: str,
    paths: Mapping[str, Path] = MappingProxyType({}),
    *,
    recipe: str = "f32",
    make_ops: MakeOps = ReferenceOps,
) -> Decoder:
    source = source_of(oracle(CONFIGS[base]), CONFIGS[base], recipe)
    adapters = {name: lora.read(path, source.spec) for name, path in paths.items()}
    return load(source, make_ops(), adapters=adapters)


def logits_of(decoder: Decoder, adapter: str | None, chunk: int = LENGTH) -> np.ndarray:
    shape = CacheShape(pages=1, ring_slack=LENGTH, kind="f32")
    cache, slot = decoder.new_cache(shape), Slot(pages=[0])
    parts: list[np.ndarray] = []
    for at in range(0, LENGTH, chunk):
        ids = IDS[at : at + chunk]
        part = Chunk(slot=slot, token_ids=ids, wanted="all", adapter=adapter)
        parts.append(decoder.forward([part], cache).copy())
    return np.concatenate(parts)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("base", ["llama", "qwen3", "gemma4-unified"])
def test_equals_peft(base: str, name: str, tmp_path: Path) -> None:
    model = saved(base, SETTINGS[name], tmp_path)
    theirs = oracle_logits(model, IDS)  # type: ignore[arg-type]
    for make_ops in OPS.values():
        decoder = decoder_of(base, {"it": tmp_path}, make_ops=make_ops)
        assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4
        assert relative_error(logits_of(decoder, None), theirs) > 1e-3


@pytest.mark.parametrize("base", ["llama-biases", "gemma3", "gemma4-everything", "qwen2"])
def test_every_linear_of_every_family_equals_peft(base: str, tmp_path: Path) -> None:
    model = saved(base, SETTINGS["all-linear"], tmp_path)
    theirs = oracle_logits(model, IDS)  # type: ignore[arg-type]
    for make_ops in OPS.values():
        decoder = decoder_of(base, {"it": tmp_path}, make_ops=make_ops)
        assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4


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


def test_loaded_together_each_is_as_if_alone(three: dict[str, Path], make_ops: MakeOps) -> None:
    together = decoder_of("gemma4-unified", three, make_ops=make_ops)
    plain = decoder_of("gemma4-unified", make_ops=make_ops)
    assert np.array_equal(logits_of(together, None), logits_of(plain, None))
    for name, path in three.items():
        alone = decoder_of("gemma4-unified", {name: path}, make_ops=make_ops)
        assert np.array_equal(logits_of(together, name), logits_of(alone, name))


@pytest.mark.parametrize("recipe", ["f32", "q4_0"])
def test_a_row_does_not_depend_on_chunks_or_company(
    three: dict[str, Path], make_ops: MakeOps, recipe: str
) -> None:
    decoder = decoder_of("gemma4-unified", three, recipe=recipe, make_ops=make_ops)
    names = ["attention", None, "rslora", "regex", "attention"]
    shape = CacheShape(pages=5, rings=5, ring_slack=LENGTH, kind="f32")
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
        for chunk in (1, 7, LENGTH) if name is not None else (7,):
            assert np.array_equal(np.concatenate(part), logits_of(decoder, name, chunk))


@pytest.mark.parametrize("max_sequences", [1, 4])
def test_requests_switch_between_adapters(
    three: dict[str, Path], max_sequences: int, make_ops: MakeOps
) -> None:
    """Each request's tokens are those of a decoder that knows its adapter alone."""

    def engine_of(paths: Mapping[str, Path]) -> Engine:
        decoder = decoder_of("gemma4-unified", paths, make_ops=make_ops)
        return Engine(decoder, context=64, max_sequences=max_sequences, kv="f32")

    engine = engine_of(three)
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
        assert engine_of(own).generate([request])[0].token_ids == chosen
    other = engine_of({}).generate([replace(request, adapter=None) for request in batch])
    assert [o.token_ids != t for o, t in zip(other, tokens, strict=True)] == [
        name is not None for name in names
    ]


def test_a_request_for_an_unknown_adapter_is_refused(three: dict[str, Path]) -> None:
    engine = Engine(decoder_of("gemma4-unified", three), context=64)
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
    rounded = logits_of(
        load(body, ReferenceOps(activations="q8_0"), adapters={"it": adapter}), "it"
    )
    for isa in HERE:
        decoder = load(body, OPS[isa](), adapters={"it": adapter})
        assert relative_error(logits_of(decoder, "it"), rounded) < 1e-2  # halves round otherwise


@pytest.mark.parametrize("base", ["llama", "gemma4-unified"])
def test_merged_it_is_one_model(base: str, tmp_path: Path) -> None:
    """The weights are those that PEFT merges; two adapters add up; quantized ones are refused."""
    model = saved(base, SETTINGS["everything"], tmp_path / "one")
    saved(base, SETTINGS["attention"], tmp_path / "two", seed=2)
    exact = source_of(oracle(CONFIGS[base]), CONFIGS[base])
    one, two = (lora.read(tmp_path / name, exact.spec) for name in ("one", "two"))
    theirs = oracle_logits(model.merge_and_unload(), IDS)  # type: ignore[arg-type]
    ours = logits_of(load(Merged(exact, [one]), ReferenceOps()), None)
    assert relative_error(ours, theirs) < 1e-4
    source = source_of(oracle(CONFIGS[base]), CONFIGS[base], "bf16")
    merged = Merged(source, [one])
    changed = {update.weight for update in one.updates.values()}
    for name, scheme in source.schemes.items():
        assert merged.schemes[name] == (SCHEMES["f32"] if name in changed else scheme)
    apart = load(source, ReferenceOps(), adapters={"it": one})
    ours = logits_of(load(merged, ReferenceOps()), None)
    assert relative_error(ours, logits_of(apart, "it")) < 1e-5
    both, twice = Merged(source, [one, two]), Merged(merged, [two])
    for name, q in both.tensors():
        assert np.allclose(decode(q), decode(twice.tensor(name)), atol=1e-6)
    with pytest.raises(InvalidInputError, match="is stored as q4_0"):
        Merged(source_of(oracle(CONFIGS[base]), CONFIGS[base], "q4_0"), [one])


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
@pytest.mark.parametrize("base", ["llama", "gemma4-everything"])
def test_peft_reads_what_we_write(base: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    spec = source_of(oracle(CONFIGS[base]), CONFIGS[base]).spec
    updates = updates_for(spec, rank=3, alpha=5, targets=targets)
    numbers = torch.Generator().manual_seed(0)
    pairs = {
        update.weight: tuple(
            encode(0.2 * torch.randn(shape, generator=numbers), SCHEMES["f32"])
            for shape in update.shapes
        )
        for update in updates
    }
    write_adapter(tmp_path, spec, updates, pairs, base="somebody/base")  # type: ignore[arg-type]
    read_back = lora.read(tmp_path, spec)
    assert {update.weight: update for update in read_back.updates.values()} == {
        update.weight: update for update in updates
    }
    theirs = oracle_logits(PeftModel.from_pretrained(oracle(CONFIGS[base]), str(tmp_path)), IDS)  # type: ignore[arg-type]
    decoder = decoder_of(base, {"it": tmp_path})
    assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4
    assert relative_error(logits_of(decoder, None), theirs) > 1e-3


def test_a_target_that_is_not_there_is_refused() -> None:
    spec = source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"]).spec
    with pytest.raises(InvalidInputError, match="no c_attn") as caught:
        updates_for(spec, rank=2, alpha=2, targets=["q_proj", "c_attn"])
    assert "gate_proj" in str(caught.value.hint)


@pytest.mark.parametrize("base", ["llama", "gemma4-unified"])
def test_on_a_gguf_whatever_the_order_of_its_rows(base: str, tmp_path: Path) -> None:
    theirs = oracle_logits(saved(base, SETTINGS["everything"], tmp_path), IDS)  # type: ignore[arg-type]
    write_gguf(source_of(oracle(CONFIGS[base]), CONFIGS[base]), tmp_path / "base.gguf")
    source = read(tmp_path / "base.gguf")
    adapters = {"it": lora.read(tmp_path, source.spec)}
    decoder = load(source, ReferenceOps(), adapters=adapters)
    assert relative_error(logits_of(decoder, "it"), theirs) < 1e-4


def linear_of(ops: OpSet, *, scheme: str = "f32", rank: int = 4) -> tuple[Any, np.ndarray]:
    """A step that is one linear of an adapted q8_0 weight, and the exact update of its 90 rows."""
    numbers = torch.Generator().manual_seed(0)
    w, a, b, e = (
        torch.randn(shape, generator=numbers)
        for shape in ((75, 96), (rank, 96), (75, rank), (90, 96))
    )
    weight = ops.pack(encode(w, SCHEMES["q8_0"]))
    table, stored_a, stored_b = (encode(t, SCHEMES[scheme]) for t in (e, a, b))
    update = LowRank(a=ops.pack(stored_a), b=ops.pack(stored_b), scale=0.5)
    linear = Linear(weight=weight, updates=(None, update))
    packed = ops.pack(table)

    def graph(rows: Rows, wanted: Any) -> Any:
        return [ops.select(ops.linear(ops.embed(rows, packed, 1.0), linear), wanted)]

    x, a, b = (decode(q).double() for q in (table, stored_a, stored_b))
    return ops.step(graph), (0.5 * (x @ a.T) @ b.T).numpy()


def span_of(count: int, start: int = 0, adapter: int | None = None) -> Span:
    return Span(start=start, count=count, pages=[0, 0], ring=0, adapter=adapter)


UNROUNDED: dict[str, MakeOps] = {
    "q8_0": lambda: ReferenceOps(activations="q8_0"),
    "bf16": lambda: ReferenceOps(activations="bf16"),
    **{isa: OPS[isa] for isa in HERE},
}


@pytest.mark.parametrize(("scheme", "rank"), [("f32", 4), ("bf16", 1), ("f16", 33)])
@pytest.mark.parametrize("name", UNROUNDED)
def test_the_update_itself_is_not_rounded(name: str, scheme: str, rank: int) -> None:
    """However the body rounds its inputs, what is added is the exact product of the exact ones."""
    step, exact = linear_of(UNROUNDED[name](), scheme=scheme, rank=rank)
    added = {
        who: step(Rows(token_ids=range(90), spans=[span_of(90, adapter=who)]), range(90))[0].copy()
        for who in (None, 0, 1)
    }
    assert np.array_equal(added[0], added[None])
    assert relative_error(added[1] - added[None], exact) < 1e-5


@pytest.mark.parametrize("isa", HERE)
def test_an_update_has_the_same_bits_in_any_company(isa: str) -> None:
    """Rows of one linear: with and without adapters, in spans of any length, on any threads."""
    numbers = np.random.default_rng(0)
    alone: dict[tuple[int, int | None], np.ndarray] = {}
    for threads in (1, 2, 5):
        step, _ = linear_of(CPUOps(threads=threads, instructions=isa), rank=7)
        for _ in range(20):
            ids = list(numbers.permutation(90)[: numbers.integers(1, 90)])
            counts = numbers.multinomial(len(ids), [0.1, 0.5, 0.2, 0.2])
            spans = [
                span_of(int(count), adapter=(None, 0, 1, 1)[index])
                for index, count in enumerate(counts)
                if count
            ]
            whose = [span.adapter for span in spans for _ in range(span.count)]
            rows = step(Rows(token_ids=ids, spans=spans), range(len(ids)))[0]
            for token, who, row in zip(ids, whose, rows, strict=True):
                known = alone.setdefault((token, who), row.copy())
                assert np.array_equal(known, row)


def test_malformed_updates_raise_before_native_code() -> None:
    if not HERE:
        pytest.skip("the native op set is not built, or not for this machine")
    ops = CPUOps(threads=1)
    step, _ = linear_of(ops)
    with pytest.raises(ValueError, match="adapter that is not there"):
        step(Rows(token_ids=[0], spans=[span_of(1, adapter=2)]), [0])
    a, b, wide = (
        ops.pack(encode(torch.zeros(shape), SCHEMES[scheme])).native
        for shape, scheme in (((4, 96), "f32"), ((75, 4), "f32"), ((4, 32), "q8_0"))
    )
    with pytest.raises(ValueError, match="do not fit"):
        native().Update(a, a, 1.0)
    with pytest.raises(ValueError, match="not of floats"):
        native().Update(wide, b, 1.0)


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
