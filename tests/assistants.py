"""Small Gemma 4 assistants of Transformers with random weights, beside small random targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from oracle import GEMMA4, GEMMA4_31B, GEMMA4_E, oracle, source_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from halfbyte.formats.checkpoint import Source

VOCAB = 128


def _text(target: Mapping[str, Any], layer_types: list[str]) -> dict[str, Any]:
    """A decoder of 32 numbers a token beside that target: its heads and rotations, queries only."""
    keys = (
        "model_type",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "global_head_dim",
        "num_global_key_value_heads",
        "attention_k_eq_v",
        "vocab_size",
        "max_position_embeddings",
        "sliding_window",
        "rope_parameters",
    )
    return {
        **{key: target[key] for key in keys if key in target},
        "hidden_size": 32,
        "intermediate_size": 64,
        "layer_types": layer_types,
        "num_hidden_layers": len(layer_types),
        "num_kv_shared_layers": len(layer_types),
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": None,
    }


SLIDING, FULL = "sliding_attention", "full_attention"
UNIFIED = {
    "model_type": "gemma4_unified_assistant",
    "backbone_hidden_size": 64,
    "text_config": _text(GEMMA4, [SLIDING, SLIDING, SLIDING, FULL]),
}
TOWER = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 64,
    "text_config": {
        **_text(GEMMA4_31B, [SLIDING, FULL, FULL]),
        "vocab_size_per_layer_input": 0,
    },
}
CLUSTERS = {
    "model_type": "gemma4_assistant",
    "backbone_hidden_size": 64,
    "use_ordered_embeddings": True,
    "num_centroids": 8,
    "centroid_intermediate_top_k": 3,
    "text_config": {
        **_text(GEMMA4_E, [SLIDING, FULL]),
        "vocab_size_per_layer_input": 0,
    },
}
# name -> (config of the target, config of its assistant)
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unified": (GEMMA4, UNIFIED),
    "tower": (GEMMA4_31B, TOWER),
    "clusters": (GEMMA4_E, CLUSTERS),
}


@dataclass(frozen=True)
class Step:
    """A step of an assistant: a token and a state [1, H] in; logits [V] and a state [H] out."""

    token: int
    given: np.ndarray
    logits: np.ndarray
    state: np.ndarray


@dataclass(frozen=True)
class Pair:
    """A target and its assistant, as Transformers runs them and as sources of ours."""

    target: PreTrainedModel
    assistant: PreTrainedModel
    target_source: Source

    def drafted(self, ids: list[int], bonus: int, steps: int) -> list[Step]:
        """The first steps after `ids`, greedy from `bonus` on."""
        with torch.no_grad():
            done = self.target(
                torch.tensor([ids]), output_hidden_states=True, return_shared_kv_states=True
            )
            window = self.target.config.sliding_window
            shared = {
                kind: tuple(part[:, :, -window:] if kind == SLIDING else part for part in parts)
                for kind, parts in done.shared_kv_states.items()
            }
            state, token = done.hidden_states[-1][:, -1:], bonus
            found: list[Step] = []
            for _ in range(steps):
                embedded = self.target.get_input_embeddings()(torch.tensor([[token]]))
                out = self.assistant(
                    inputs_embeds=torch.cat([embedded, state], dim=-1),
                    position_ids=torch.tensor([[len(ids)]]),
                    shared_kv_states=shared,
                )
                given, state = state[0].numpy(), out.last_hidden_state
                found.append(Step(token, given, out.logits[0, 0].numpy(), state[0, 0].numpy()))
                token = int(out.logits[0, 0].argmax())
        return found


def pair(name: str) -> Pair:
    """A random target and a random assistant."""
    target_config, config = PAIRS[name]
    target = oracle(target_config)
    return Pair(target, assistant(config), source_of(target, target_config))


def assistant(config: Mapping[str, Any], seed: int = 1) -> PreTrainedModel:
    """A random assistant in f32; the weights of its norms and scalars are random, too."""
    settings = dict(config)
    text = dict(settings.pop("text_config"))
    torch.manual_seed(seed)
    kind = settings.pop("model_type")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            kind, text_config=AutoConfig.for_model(text.pop("model_type"), **text), **settings
        ),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("token_ordering"):
                tensor.copy_(torch.randperm(len(tensor), generator=generator))
            elif "norm" in name or name.endswith("layer_scalar"):
                tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
            elif not name.endswith("inv_freq") and "embed_scale" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
    return model
