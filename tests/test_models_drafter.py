"""Twins of the drafters: a step equals Transformers' assistant, from its own files and a GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assistants import PAIRS, VOCAB, Pair, pair
from oracle import CONFIGS, MemorySource, oracle, relative_error, source_of
from random_drafters import random_drafter

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.families import family_of, spec_of
from halfbyte.families.gemma4_assistant import drafter_for
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.kernels.contract import OpSet, Rows, Span
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.load import load, load_drafter
from halfbyte.specs import RopeSpec, paired_layers

LENGTH, STEPS = 60, 4  # more than two windows of 24
IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, LENGTH)]
BONUS = 17
OPS = [ReferenceOps] + ([lambda: CPUOps(threads=2)] if instruction_set() else [])


@pytest.fixture(scope="module", params=PAIRS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A pair of Transformers, and our source of the assistant as it saves it."""
    made = pair(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    made.assistant.save_pretrained(folder)
    return made, read(folder)


def steps(made: Pair, source: Checkpoint, ops: OpSet, *, junk: int = 0):
    """Our outputs for what each of Transformers' steps was given; `junk` rejected tokens behind."""
    target = load(made.target_source, ops)
    drafter = load_drafter(source, target)
    cache = target.new_cache(CacheShape(pages=2, ring_slack=LENGTH, kind="f32"))
    slot = Slot(pages=[1, 0])
    target.forward([Chunk(slot=slot, token_ids=IDS, wanted="none")], cache)
    if junk:
        target.forward([Chunk(slot=slot, token_ids=[3] * junk, wanted="none")], cache)
        slot.rollback(junk)
    for step in made.drafted(IDS, BONUS, STEPS):
        logits, states = drafter.forward([step.token], step.given, [slot], cache)
        yield step, logits[0].copy(), states[0].copy()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("junk", [0, 5])
def test_a_step_equals_transformers(both: tuple[Pair, Checkpoint], ops: Any, junk: int) -> None:
    made, source = both
    clustered = source.spec.drafter.centroids is not None
    for step, logits, state in steps(made, source, ops(), junk=junk):
        # Transformers gives the tokens outside of the clusters less than the least inside.
        held = step.logits > step.logits.min() if clustered else np.full(VOCAB, True)
        assert np.array_equal(np.isfinite(logits), held)
        assert relative_error(logits[held], step.logits[held]) < 5e-5
        assert relative_error(state, step.state) < 5e-5


def test_a_gguf_of_it_is_the_same(both: tuple[Pair, Checkpoint], tmp_path: Path) -> None:
    made, source = both
    write_gguf(source, tmp_path / "drafter.gguf")
    found = read(tmp_path / "drafter.gguf")
    assert found.spec == source.spec
    ours, again = (list(steps(made, it, ReferenceOps())) for it in (source, found))
    for (_, logits, state), (_, its_logits, its_state) in zip(ours, again, strict=True):
        assert np.array_equal(logits, its_logits) and np.array_equal(state, its_state)


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_state_is_what_transformers_starts_from(name: str) -> None:
    made = pair(name)
    target = load(made.target_source, ReferenceOps())
    cache = target.new_cache(CacheShape(pages=1, ring_slack=LENGTH, kind="f32"))
    _, states = target.outputs([Chunk(slot=Slot(pages=[0]), token_ids=IDS)], cache)
    first = made.drafted(IDS, BONUS, 1)[0]
    assert relative_error(states, first.given) < 5e-5


def random_pair(config: str = "llama", **options: Any) -> tuple[Decoder, MemorySource]:
    """A random target on the reference, and a random drafter for it."""
    target = load(source_of(oracle(CONFIGS[config]), CONFIGS[config]), ReferenceOps())
    return target, random_drafter(target.spec, **options)


def test_a_shortlist_has_no_other_tokens() -> None:
    target, source = random_pair(head_rows=20)
    drafter = load_drafter(source, target)
    cache = target.new_cache(CacheShape(pages=1, ring_slack=8, kind="f32"))
    slot = Slot(pages=[0])
    _, states = target.outputs([Chunk(slot=slot, token_ids=IDS[:8])], cache)
    logits, _ = drafter.forward([3], states, [slot], cache)
    tokens = source.weights["head.tokens"].int().tolist()
    assert np.flatnonzero(np.isfinite(logits[0])).tolist() == sorted(tokens)


@pytest.mark.parametrize("config", ["llama", "llama3-rope", "gemma3", "gemma4-per-layer"])
def test_a_drafter_for_any_target_goes_through_a_gguf(config: str, tmp_path: Path) -> None:
    target, source = random_pair(config, head_rows=20, fingerprint="abc")
    layers = tuple(
        replace(layer, attention=replace(layer.attention, ahead=0)) for layer in source.spec.layers
    )
    source = replace(source, spec=replace(source.spec, layers=layers))
    write_gguf(source, tmp_path / "drafter.gguf")
    found = read(tmp_path / "drafter.gguf")
    assert found.spec == source.spec
    assert paired_layers(found.spec, target.spec) == paired_layers(source.spec, target.spec)
    ours, again = (load_drafter(it, target) for it in (source, found))
    assert ours.spec == again.spec


def test_a_layer_before_the_last_can_be_read(tmp_path: Path) -> None:
    target = load(source_of(oracle(CONFIGS["llama"]), CONFIGS["llama"]), ReferenceOps())
    spec = drafter_for(target.spec, reads=[0, 1], hidden=32, width=64)
    assert [layer.kv_source for layer in spec.layers] == [-2, -1]
    assert paired_layers(spec, target.spec) == (0, 1)
    metadata = {f"gemma4-assistant.{k}": v for k, v in family_of(spec).to_metadata(spec).items()}
    assert metadata["gemma4-assistant.halfbyte.kv_sources"] == [-2, -1]


def test_query_positions_move_the_queries_and_nothing_else() -> None:
    target, source = random_pair("gemma4-unified")
    outcomes = []
    for ahead in (0, 1):
        layers = tuple(
            replace(layer, attention=replace(layer.attention, ahead=ahead))
            for layer in source.spec.layers
        )
        drafter = load_drafter(replace(source, spec=replace(source.spec, layers=layers)), target)
        cache = target.new_cache(CacheShape(pages=1, ring_slack=LENGTH, kind="f32"))
        slot = Slot(pages=[0])
        _, states = target.outputs([Chunk(slot=slot, token_ids=IDS)], cache)
        outcomes.append(drafter.forward([BONUS], states, [slot], cache)[0].copy())
    assert 1e-4 < relative_error(*outcomes) < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drafter": {"target_hidden": 32}}, "of width 32, not 64"),
        ({"vocab": 100}, "of vocabulary 100, not 128"),
        ({"attention": {"kv_heads": 1}}, "1 key/value heads of 16"),
        ({"attention": {"window": 24}}, "reads a sliding layer that the target does not have"),
        ({"attention": {"rope": RopeSpec(theta=5.0)}}, "rotated otherwise"),
        ({"kv_source": -3}, "reads a full layer that the target does not have"),
    ],
)
def test_a_drafter_of_another_target_is_refused(change: dict[str, Any], message: str) -> None:
    target, source = random_pair()
    spec = source.spec
    (layer,) = spec.layers
    if "attention" in change:
        layer = replace(layer, attention=replace(layer.attention, **change["attention"]))
    if "kv_source" in change:
        layer = replace(layer, **change)
    if "vocab" in change:
        spec = replace(spec, **change)
    if "drafter" in change:
        spec = replace(spec, drafter=replace(spec.drafter, **change["drafter"]))
    with pytest.raises(InvalidInputError, match=message):
        paired_layers(replace(spec, layers=(layer,)), target.spec)


def test_a_drafter_is_no_model_and_a_model_no_drafter() -> None:
    target, source = random_pair()
    with pytest.raises(UnsupportedError, match="does not run alone"):
        load(source, ReferenceOps())
    with pytest.raises(InvalidInputError, match="is no drafter"):
        paired_layers(target.spec, target.spec)
    with pytest.raises(InvalidInputError, match="target is a drafter"):
        paired_layers(source.spec, source.spec)


def test_tokens_of_a_head_are_each_different_and_known() -> None:
    target, source = random_pair(head_rows=20)
    for wrong in (torch.zeros(20), torch.arange(20) + 120.0):
        weights = {**source.weights, "head.tokens": wrong}
        with pytest.raises(IntegrityError, match="ids twice, or outside the vocabulary"):
            load_drafter(replace(source, weights=weights), target)


@pytest.mark.parametrize("config", ["gemma4-unified", "llama"])
def test_all_places_of_a_text_at_once_are_the_steps_at_each(config: str) -> None:
    """What training needs: a row for every place, keys of the forward under way, gradients."""
    source = source_of(oracle(CONFIGS[config]), CONFIGS[config])
    target = load(source, ReferenceOps(exact_rows=False))
    drafter = load_drafter(random_drafter(target.spec), target)
    text, following = IDS[:-1], IDS[1:]
    spans = [Span(start=0, count=len(text), pages=(), ring=0)]
    caches = [ScratchKV() for _ in target.spec.layers]
    states = target.states(Rows(token_ids=text, spans=spans), caches).requires_grad_()
    logits, next_states = drafter.step(
        Rows(token_ids=following, spans=spans, states=states),
        [caches[index] for index in paired_layers(drafter.spec, target.spec)],
    )
    for place in (0, 5, 40, len(text) - 1):
        cache = target.new_cache(CacheShape(pages=1, ring_slack=LENGTH, kind="f32"))
        slot = Slot(pages=[0])
        target.forward([Chunk(slot=slot, token_ids=text[: place + 1], wanted="none")], cache)
        given = states[place : place + 1].detach().numpy()
        one, state = drafter.forward([following[place]], given, [slot], cache)
        assert relative_error(one[0], logits[place].detach().numpy()) < 1e-4
        assert relative_error(state[0], next_states[place].detach().numpy()) < 1e-4
    logits.logsumexp(-1).sum().backward()
    assert states.grad is not None and states.grad.abs().sum() > 0


def published(hidden: int, target: int, width: int, heads: int, kv: tuple[int, int]) -> dict:
    """The fields of a published assistant that tell its size."""
    return {
        "model_type": "gemma4_assistant",
        "backbone_hidden_size": target,
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "num_attention_heads": heads,
            "num_key_value_heads": kv[0],
            "num_global_key_value_heads": kv[1],
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    }


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (published(256, 1536, 2048, 4, (1, 1)) | {"use_ordered_embeddings": True}, 77.7),
        (published(256, 2560, 2048, 4, (2, 2)) | {"use_ordered_embeddings": True}, 78.5),
        (published(1024, 3840, 8192, 16, (8, 1)), 422.9),
        (published(1024, 2816, 8192, 16, (8, 2)), 419.7),
        (published(1024, 5376, 8192, 32, (16, 4)), 469.5),
    ],
    ids=["E2B", "E4B", "12B", "26B-A4B", "31B"],
)
def test_published_assistants_have_their_published_sizes(config: dict, millions: float) -> None:
    spec = spec_of(config)
    stored = sum(t.count for t in spec.tensors() if not t.name.endswith(".tokens"))
    assert stored / 1e6 == pytest.approx(millions, abs=0.06)
