"""Twins: a spec's tensors are exactly those of a Transformers model on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.errors import HalfbyteError, IntegrityError, UnsupportedError
from halfbyte.families import family_of, spec_of

LLAMA_32_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
GEMMA4_12B_TEXT = {
    "model_type": "gemma4_unified_text",
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 1024,
    "vocab_size": 262144,
    "max_position_embeddings": 262144,
    "final_logit_softcapping": 30.0,
}
GEMMA4_31B_TEXT = {
    **GEMMA4_12B_TEXT,
    "model_type": "gemma4_text",
    "hidden_size_per_layer_input": 0,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "num_global_key_value_heads": 4,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
}
QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
PUBLISHED = {
    "llama-3.2-1b": (LLAMA_32_1B, 1.236),
    "gemma4-12b": (GEMMA4_12B_TEXT, 11.907),
    "gemma4-31b": (GEMMA4_31B_TEXT, 30.697),
    "mistral-7b": (MISTRAL_7B, 7.242),
    "qwen2-0.5b": (QWEN2_05B, 0.494),
}


def meta_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    settings = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings)
        )
    scalars = {n: tuple(b.shape) for n, b in model.named_buffers() if n.endswith("layer_scalar")}
    return {**{n: tuple(p.shape) for n, p in model.named_parameters()}, **scalars}


@pytest.mark.parametrize(
    "config",
    [*CONFIGS.values(), *(config for config, _ in PUBLISHED.values())],
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
