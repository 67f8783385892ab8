"""Sabotage: every known disaster misses the gate, or is repaired, and its cause is named."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, oracle, source_of
from sabotage import FAULTS, TEXT_FAULTS, Fault, measured, planted, sound, stored
from torch import Tensor

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.evals.diagnose import diagnose, differences
from halfbyte.evals.gate import default_gate, misses
from halfbyte.evals.positions import profile
from halfbyte.evals.weights import ROUNDING, weight_faults
from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.numerics.codec import decode, encode
from halfbyte.specs import SCHEMES
from halfbyte.specs.differences import spec_differences
from halfbyte.text.assets import TextAssets, assets_from_directory
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("tiny_gemma4", "stories260k", "shared_data")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_misses_the_gate_and_is_named(fault: Fault) -> None:
    source = planted(fault)
    found = measured(source, fault.model, fault.ops(), 1)
    assert misses(default_gate(source.spec, source.schemes), [found])
    assert fault.says in diagnose(source, sound(fault.model), [found]).causes[0]


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        *(("gemma4", recipe) for recipe in ("bf16", "q8_0", "q4_0", "q4_0-pure")),
        *(("llama", recipe) for recipe in ("f32", "q8_0")),
    ],
)
def test_a_sound_model_passes_and_nothing_is_blamed(model: str, recipe: str) -> None:
    """With the rounding of activations that an ordinary run has."""
    source = stored(model, recipe)
    found = measured(source, model, ReferenceOps(activations="q8_0", exact_rows=False), 1)
    assert misses(default_gate(source.spec, source.schemes), [found]) == []
    assert differences(source, sound(model)) == weight_faults(source, sound(model)) == []


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_how_far_rounding_reaches_is_known_of_every_scheme(name: str) -> None:
    """And is that of what we can write, to a tenth."""
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    reach = ROUNDING[name]
    with suppress(UnsupportedError):
        error = decode(encode(weight, SCHEMES[name])) - weight
        distance = float(error.norm() / weight.norm())
        assert distance <= reach and (distance > 0.75 * reach or reach < 1e-2)


def test_a_model_too_small_for_four_bits_blames_the_rounding() -> None:
    source = stored("llama", "q4_0")
    found = measured(source, "llama", ReferenceOps(exact_rows=False), 1)
    assert misses(default_gate(source.spec, source.schemes), [found])
    found = diagnose(source, sound("llama"), [found])
    assert not found.at_fault and "the rounding of q4_0" in found.causes[0]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_below_the_noise_of_four_bits_is_told_all_the_same(fault: Fault) -> None:
    if fault.ops is not Fault.ops:
        pytest.skip("nothing but the numbers can tell")
    assert fault.says in diagnose(planted(fault, "q4_0"), sound(fault.model), []).causes[0]


@pytest.mark.parametrize("fault", TEXT_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_the_text_is_told(fault: Fault) -> None:
    assert any(fault.says in told for told in differences(planted(fault), sound(fault.model)))


def assets_of(source: Source) -> TextAssets:
    assert source.assets is not None
    return source.assets


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("layers.0.attn.q.weight", lambda w: w.T, "transposed"),
        ("layers.0.mlp.up.weight", lambda w: 3 * w, "multiplied by 3"),
        ("layers.0.mlp.up.weight", lambda w: w.roll(-1, 0), "one too early"),
        ("layers.0.mlp.up.weight", lambda w: w.roll(7, 0), "which rounding does not explain"),
        ("layers.3.experts.down.weight", lambda w: -w, "multiplied by -1"),
        ("norm.weight", lambda w: w + 0.1, "which rounding does not explain"),
    ],
)
def test_a_tensor_says_what_became_of_it(
    name: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    config = CONFIGS["gemma4-experts"]
    good = source_of(oracle(config), config)
    bad = replace(good, weights={**good.weights, name: change(good.weights[name])})
    [told] = weight_faults(bad, good)
    assert told.startswith(f"{name}: ") and says in told


def test_missing_stops_are_repaired_from_the_template() -> None:
    assets = assets_of(sound("gemma4"))
    poor = replace(assets, generation=replace(assets.generation, eos_ids=(1,)))
    assert Chat(Tokenizer(poor), poor).stop_ids == {1, 50, 106}
    poorer = replace(poor, template=None)
    told = differences(replace_assets(sound("gemma4"), poorer), sound("gemma4"))
    assert any("do not stop at" in line and "'<turn|>'" in line for line in told)


def replace_assets(source: Source, assets: TextAssets) -> Source:
    fault = Fault(name="", says="", assets=lambda _: assets)
    return planted(fault)


def test_bos_is_neither_missing_nor_doubled() -> None:
    """The fixture's files say that no BOS is added, and its template writes one."""
    assets = assets_of(sound("gemma4"))
    for template in (assets.template, "{{ bos_token }}" + str(assets.template)):
        own = replace(assets, template=template)
        ids = Chat(Tokenizer(own), own).render([{"role": "user", "content": "Hello"}])
        assert ids.count(2) == 1 and ids[0] == 2


def test_more_tokens_than_rows_are_refused(tiny_gemma4: Path) -> None:
    with pytest.raises(IntegrityError, match="8191 is outside the 8000 rows"):
        assets_from_directory(tiny_gemma4, num_rows=8000)


def test_another_number_of_layers_is_one_difference() -> None:
    spec = sound("gemma4").spec
    shorter = replace(spec, layers=spec.layers[:3])
    assert spec_differences(shorter, spec) == ["has 3 layers; the reference has 6"]


def test_a_profile_finds_the_edge_of_a_window() -> None:
    positions = np.tile(np.arange(16), 2)
    kl = np.where(positions >= 12, 1.0, 0.0)
    found = profile(kl, positions, 12)
    assert (found.within_window, found.beyond_window) == (0.0, 1.0)
    assert (found.first_quarter, found.last_quarter) == (0.0, 1.0)
    assert profile(kl, positions, None).beyond_window is None
    assert profile(kl, positions + 12, 12).within_window is None
