"""A spec as a config.json: read back as the same spec, and the same model in Transformers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from oracle import CONFIGS, oracle, oracle_logits, relative_error
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halfbyte.errors import UnsupportedError
from halfbyte.families import FAMILIES, config_of, spec_of

IDS = list(range(40))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama3-rope"])
def test_a_config_of_a_spec_is_the_same_model(name: str) -> None:
    model = oracle(CONFIGS[name])
    spec = spec_of(model.config.to_dict())
    config = config_of(spec)
    assert spec_of(config) == spec
    twin = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert [type(twin).__name__] == config["architectures"]
    twin.load_state_dict(model.state_dict())
    assert relative_error(oracle_logits(twin.eval(), IDS), oracle_logits(model, IDS)) < 1e-4


def test_divisors_that_do_not_tell_their_rule() -> None:
    with pytest.raises(UnsupportedError, match=r"no config.json can say"):
        config_of(spec_of(CONFIGS["llama3-rope"]))


def test_layers_that_no_config_describes() -> None:
    spec = spec_of(CONFIGS["llama"])
    wider = replace(spec.layers[1], mlp=replace(spec.layers[1].mlp, width=160))
    with pytest.raises(UnsupportedError, match=r"no config.json that says all of it"):
        config_of(replace(spec, layers=(spec.layers[0], wider)))


def test_classes_are_those_of_transformers() -> None:
    for family in FAMILIES:
        for kind, name in family.classes.items():
            assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] == name
