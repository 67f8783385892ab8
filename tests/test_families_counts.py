"""Twins: a spec's tensors are exactly those of a Transformers model on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
from oracle import CONFIGS, meta_tensors
from published import PUBLISHED, text_of
from transformers import AutoConfig

from halfbyte.errors import HalfbyteError, IntegrityError, UnsupportedError
from halfbyte.families import family_of, spec_of


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), *(text_of(config) for config, _ in PUBLISHED.values())],
    ids=[*CONFIGS, *PUBLISHED],
)
def test_tensors_equal_transformers(config: dict[str, Any]) -> None:
    spec = spec_of(config)
    names = family_of(spec).names(spec)
    ours = {names[tensor.name].hf: tensor.shape for tensor in spec.tensors()}
    theirs = {name.removeprefix("model."): shape for name, shape in meta_tensors(config).items()}
    assert ours == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    config, billions = PUBLISHED[name]
    assert round(spec_of(config).parameters / 1e9, 3) == billions


def test_both_dialects_of_gemma4_give_one_spec() -> None:
    settings = dict(CONFIGS["gemma4-unified"])
    written = AutoConfig.for_model(settings.pop("model_type"), **settings).to_dict()
    assert "per_layer_config" in written and "global_head_dim" not in written
    assert spec_of(written) == spec_of(CONFIGS["gemma4-unified"])


def test_a_multimodal_config_is_read_through_its_text_config() -> None:
    text = CONFIGS["gemma4-unified"]
    outer = {"model_type": "gemma4_unified", "text_config": text, "vision_config": {}}
    assert spec_of(outer) == spec_of(text)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "known: llama"),
        ({"model_type": None}, UnsupportedError, "None"),
        ({"hidden_size": None}, IntegrityError, "hidden_size"),
        ({"hidden_size": -4}, IntegrityError, "hidden_size"),
        ({"num_hidden_layers": 10**15}, IntegrityError, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, IntegrityError, "key/value heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, UnsupportedError, "llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, IntegrityError, "low_freq_factor"),
        ({"hidden_act": "relu"}, UnsupportedError, "relu"),
        ({"tie_word_embeddings": "yes"}, IntegrityError, "tie_word_embeddings"),
    ],
)
def test_bad_configs_are_refused_by_name(
    change: dict[str, Any], error: type[HalfbyteError], says: str
) -> None:
    with pytest.raises(error, match=says):
        spec_of({**CONFIGS["llama"], **change})


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("gemma4-unified", {"use_bidirectional_attention": "all"}, UnsupportedError),
        ("gemma4-unified", {"hidden_activation": "silu"}, UnsupportedError),
        ("gemma4-unified", {"attention_bias": True}, UnsupportedError),
        ("gemma4-per-layer", {"vocab_size_per_layer_input": 64}, UnsupportedError),
        ("gemma4-per-layer", {"num_kv_shared_layers": 4}, IntegrityError),
        ("gemma4-experts", {"top_k_experts": 9}, IntegrityError),
        ("gemma4-experts", {"num_experts": None}, IntegrityError),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedError),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedError),
        ("gemma3", {"attention_bias": True}, UnsupportedError),
        ("gemma3", {"hidden_activation": "silu"}, UnsupportedError),
        ("gemma3", {"num_key_value_heads": 3}, IntegrityError),
        ("gemma3", {"layer_types": ["full_attention"]}, IntegrityError),
    ],
)
def test_what_a_family_does_not_run_is_refused(
    name: str, change: dict[str, Any], error: type[HalfbyteError]
) -> None:
    with pytest.raises(error):
        spec_of({**CONFIGS[name], **change})
