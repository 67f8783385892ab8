"""The oracle: small random-weight Transformers models, and the same weights as a source of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.families import family_of, spec_of
from halfbyte.numerics.codec import encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import ModelSpec, Recipe, Scheme, recipe_of

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA4 = {
    "model_type": "gemma4_unified_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
GEMMA4_31B = {
    **GEMMA4,
    "model_type": "gemma4_text",
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 32}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "sliding_window": 24,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 24,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
GEMMA4_MOE = {
    **GEMMA4_31B,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 32,
}
GEMMA4_E = {
    **GEMMA4_31B,
    "attention_k_eq_v": False,
    "num_global_key_value_heads": None,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {**LLAMA, "head_dim": 32, "num_key_value_heads": 4},
    "llama-odd-width": {**LLAMA, "intermediate_size": 100},
    "llama3-rope": {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "llama-linear-rope": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "mistral-window": {**LLAMA, "model_type": "mistral", "sliding_window": 24},
    "qwen2": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
    },
    "qwen3": QWEN3,
    "qwen3-tied": {**QWEN3, "tie_word_embeddings": True},
    "qwen3-biases": {**QWEN3, "attention_bias": True},
    "gemma3": GEMMA3,
    "gemma3-linear-rope": {**GEMMA3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3-all-full": {**GEMMA3, "sliding_window_pattern": 1},
    "gemma3-softcap": {**GEMMA3, "final_logit_softcapping": 20.0},
    "gemma4-unified": GEMMA4,
    "gemma4-31b": GEMMA4_31B,
    "gemma4-own-values": {**GEMMA4, "attention_k_eq_v": False},
    "gemma4-no-softcap": {**GEMMA4, "final_logit_softcapping": None},
    "gemma4-experts": GEMMA4_MOE,
    "gemma4-one-expert": {**GEMMA4_MOE, "top_k_experts": 1},
    "gemma4-per-layer": GEMMA4_E,
    "gemma4-shared-kv": {**GEMMA4_E, "hidden_size_per_layer_input": 0},
    "gemma4-narrow-mlp": {**GEMMA4_E, "use_double_wide_mlp": False, "num_kv_shared_layers": 2},
    "gemma4-everything": {**GEMMA4_MOE, **GEMMA4_E, "enable_moe_block": True},
}


@dataclass(frozen=True)
class MemorySource:
    """A source held in memory: f32 weights stored by a recipe."""

    spec: ModelSpec
    weights: Mapping[str, torch.Tensor]
    recipe: Recipe
    assets: None = None

    @property
    def schemes(self) -> dict[str, Scheme]:
        return {t.name: self.recipe.scheme_for(t.name, t.shape) for t in self.spec.tensors()}

    def tensor(self, name: str) -> QTensor:
        return encode(self.weights[name], self.schemes[name])

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self.tensor(tensor.name)


def meta_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that the Transformers model of a config.json stores."""
    settings = dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings)
        )
    scalars = {n: tuple(b.shape) for n, b in model.named_buffers() if n.endswith("layer_scalar")}
    return {**{n: tuple(p.shape) for n, p in model.named_parameters()}, **scalars}


def oracle(config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """The Transformers model of a config.json, random weights in f32, eager attention.

    Norm weights, biases and scales are random too, so that a flag that is ignored shows.
    """
    settings = dict(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    norm = 0.0 if config["model_type"].startswith("gemma3") else 1.0
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("inv_freq") or "embed_scale" in name:
                continue
            if "norm" in name or name.endswith(("layer_scalar", "scale")):
                tensor.copy_(norm + 0.3 * torch.randn(tensor.shape, generator=generator))
            else:
                scale = 0.3 if name.endswith("bias") else tensor.shape[-1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def source_of(
    model: PreTrainedModel, config: Mapping[str, Any], recipe: str = "f32"
) -> MemorySource:
    """Our source of the same weights."""
    spec = spec_of(config)
    family = family_of(spec)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    prefix = "model." if "model.embed_tokens.weight" in state else "model.language_model."
    weights = {
        ours: (state.get(prefix + name.hf, state.get(name.hf))).detach().float() + name.offset  # type: ignore[union-attr]
        for ours, name in family.names(spec).items()
    }
    return MemorySource(spec, weights, recipe_of(recipe))


def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    """Logits [len(token_ids), V] of one forward over the whole sequence."""
    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
