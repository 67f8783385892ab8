"""Gemma 4, dense text models: 12B ("unified") and 31B, and anything in their architecture.

Five sliding layers to one global layer; global layers have a wider head, fewer key/value heads,
no value projection (`attention_k_eq_v`) and a rope that rotates a quarter of the pairs; q and k are
normed with weights, v without; attention scale 1; norms before and after each part; a scalar per
layer; final soft-cap. Norm weights multiply as they are (not 1 + w).

Both dialects of config.json are read: `global_head_dim` / `num_global_key_value_heads`, and the
`per_layer_config` map that Transformers writes since 5.22. The embedding multiplier is sqrt(hidden)
rounded to bf16, as the trained model saw it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from math import isinf, sqrt
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.family import Family, Header
from halfbyte.families.fields import Fields
from halfbyte.families.names import COMMON, Name, expand
from halfbyte.families.rope import rope_of
from halfbyte.specs import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, RopeSpec

SLIDING_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FULL_ROPE = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}
# What an absent field means: the defaults of the two config classes.
TOWER_DEFAULTS = {
    "sliding_window": 512,
    "max_position_embeddings": 131072,
    "hidden_size_per_layer_input": 256,
}
UNIFIED_DEFAULTS = {
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "hidden_size_per_layer_input": 0,
}


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a gemma4 or gemma4_unified config.json, multimodal or text only."""
    outer = Fields(config)
    text = outer.table("text_config") if outer.get("text_config") else outer
    unified = "unified" in str(config["model_type"])
    present = {key: value for key, value in text.values.items() if value is not None}
    fields = Fields({**(UNIFIED_DEFAULTS if unified else TOWER_DEFAULTS), **present})
    _refuse_unsupported(fields)
    hidden = fields.integer("hidden_size")
    types = _layer_types(fields)
    overrides = _layer_overrides(fields, types)
    heads = fields.integer("num_attention_heads")
    window = fields.integer("sliding_window")
    layers: list[LayerSpec] = []
    for index, name in enumerate(types):
        full = name == "full_attention"
        head_dim = overrides[index].integer("head_dim", fields.integer("head_dim", 256))
        kv_heads = overrides[index].integer(
            "num_key_value_heads", fields.integer("num_key_value_heads", 4)
        )
        layers.append(
            _layer(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=_config_rope(fields, name, head_dim),
                window=None if full else window,
                shares_kv=full and fields.flag("attention_k_eq_v"),
                width=fields.integer("intermediate_size"),
            )
        )
    return ModelSpec(
        family="gemma4",
        architecture="gemma4",
        hidden=hidden,
        vocab=fields.integer("vocab_size", 262144),
        context=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings", True),
        layers=tuple(layers),
        embed_scale=round_bf16(sqrt(hidden)),
        logit_softcap=_optional(fields, "final_logit_softcapping"),
    )


def _refuse_unsupported(fields: Fields) -> None:
    refused = {
        "mixture of experts": fields.flag("enable_moe_block"),
        "per-layer embeddings": bool(fields.get("hidden_size_per_layer_input", 0)),
        "shared key/value layers": bool(fields.get("num_kv_shared_layers", 0)),
        "attention biases": fields.flag("attention_bias"),
        "bidirectional text attention": fields.get("use_bidirectional_attention") == "all",
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{what} in gemma4", hint="dense gemma4 (12B, 31B) runs")
    activation = fields.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedError(f"activation '{activation}' in gemma4")


def _layer_types(fields: Fields) -> list[str]:
    """Sliding or full for every layer; the last one is always full (the model is built so)."""
    count = fields.layers("num_hidden_layers", 30)
    named = fields.sequence("layer_types")
    types = (
        [str(name) for name in named]
        if named is not None
        else ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(count)]
    )
    if len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        raise IntegrityError(f"layer_types does not describe {count} sliding or full layers")
    return [*types[:-1], "full_attention"]


def _layer_overrides(fields: Fields, types: list[str]) -> list[Fields]:
    """What differs from the common numbers, per layer, from either dialect."""
    stored = fields.table("per_layer_config").values
    if stored:
        return [
            Fields(stored.get(str(i), stored.get(i, {})) or {})  # pyright: ignore
            for i in range(len(types))
        ]
    full: dict[str, Any] = {"head_dim": fields.integer("global_head_dim", 512)}
    if fields.flag("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
        full["num_key_value_heads"] = fields.integer("num_global_key_value_heads")
    return [Fields(full if name == "full_attention" else {}) for name in types]


def _config_rope(fields: Fields, layer_type: str, head_dim: int) -> RopeSpec:
    tables = fields.get("rope_parameters")
    default = FULL_ROPE if layer_type == "full_attention" else SLIDING_ROPE
    table = Fields(default) if tables is None else Fields(tables).table(layer_type)
    return rope_of(table, head_dim, 10000.0)


def from_header(header: Header) -> ModelSpec:
    """The spec of a GGUF of architecture gemma4."""
    fields = header.fields()
    if fields.count("attention.shared_kv_layers", 0) or fields.count("expert_count", 0):
        raise UnsupportedError("shared key/value layers or experts in gemma4")
    if fields.count("embedding_length_per_layer_input", 0):
        raise UnsupportedError("per-layer embeddings in gemma4")
    count = fields.layers("block_count")
    pattern = fields.sequence("attention.sliding_window_pattern")
    if pattern is None or len(pattern) != count:
        raise IntegrityError(f"attention.sliding_window_pattern does not describe {count} layers")
    kv_heads = fields.per_layer("attention.head_count_kv", count)
    widths = fields.per_layer("feed_forward_length", count)
    hidden = fields.integer("embedding_length")
    layers = tuple(
        _layer(
            heads=fields.integer("attention.head_count"),
            kv_heads=kv_heads[index],
            head_dim=fields.integer(f"attention.key_length{'_swa' if sliding else ''}"),
            rope=_header_rope(header, fields, bool(sliding)),
            window=fields.integer("attention.sliding_window") if sliding else None,
            shares_kv=f"blk.{index}.attn_v.weight" not in header.shapes,
            width=widths[index],
        )
        for index, sliding in enumerate(pattern)
    )
    return ModelSpec(
        family="gemma4",
        architecture="gemma4",
        hidden=hidden,
        vocab=header.shapes["token_embd.weight"][0],
        context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in header.shapes,
        layers=layers,
        embed_scale=round_bf16(sqrt(hidden)),
        logit_softcap=_optional(fields, "final_logit_softcapping"),
    )


def _header_rope(header: Header, fields: Fields, sliding: bool) -> RopeSpec:
    if sliding:
        return RopeSpec(theta=fields.number("rope.freq_base_swa", 10000.0))
    theta = fields.number("rope.freq_base", 1000000.0)
    if header.rope_divisors is None:
        raise IntegrityError("rope_freqs.weight is missing; the global layers need it")
    rotated = sum(not isinf(value) for value in header.rope_divisors)
    scaling = f"proportional, {rotated} of {len(header.rope_divisors)} pairs rotate"
    return RopeSpec(theta=theta, divisors=header.rope_divisors, scaling=scaling)


def to_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF metadata of this spec, without the architecture's prefix.

    Raises `UnsupportedError` for what the architecture's readers cannot express: no sliding layer,
    or full layers whose rope is not given by divisors.
    """
    kinds = [layer.attention for layer in spec.layers]
    sliding = next((kind for kind in kinds if kind.window is not None), None)
    full = spec.layers[-1].attention
    if sliding is None or full.rope.divisors is None:
        raise UnsupportedError("a gemma4 GGUF needs sliding layers and proportional rope")
    metadata: dict[str, Any] = {
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "block_count": len(spec.layers),
        "feed_forward_length": spec.layers[0].mlp.width,
        "attention.head_count": full.heads,
        "attention.head_count_kv": [layer.attention.kv_heads for layer in spec.layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "attention.sliding_window": sliding.window,
        "attention.sliding_window_pattern": [
            layer.attention.window is not None for layer in spec.layers
        ],
        "attention.shared_kv_layers": 0,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "embedding_length_per_layer_input": 0,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "rope.freq_base": full.rope.theta,
        "rope.freq_base_swa": sliding.rope.theta,
    }
    if spec.logit_softcap is not None:
        metadata["final_logit_softcapping"] = spec.logit_softcap
    return metadata


def _layer(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope: RopeSpec,
    window: int | None,
    shares_kv: bool,
    width: int,
) -> LayerSpec:
    if heads % kv_heads:
        raise IntegrityError(f"{heads} heads cannot share {kv_heads} key/value heads evenly")
    return LayerSpec(
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            scale=1.0,
            window=window,
            qk_norm=True,
            value_norm=True,
            shares_kv=shares_kv,
        ),
        mlp=MLPSpec(width=width, activation="gelu_tanh"),
        post_norms=True,
        scalar=True,
    )


def _optional(fields: Fields, key: str) -> float | None:
    return None if fields.get(key) is None else fields.number(key)


def round_bf16(value: float) -> float:
    """The nearest bfloat16, ties to even."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


ROWS = (
    *COMMON,
    (
        "layers.{i}.attn_post_norm.weight",
        "layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.post_attention_norm.weight",
    ),
    (
        "layers.{i}.mlp_norm.weight",
        "layers.{i}.pre_feedforward_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
    (
        "layers.{i}.mlp_post_norm.weight",
        "layers.{i}.post_feedforward_layernorm.weight",
        "blk.{i}.post_ffw_norm.weight",
    ),
    ("layers.{i}.scalar", "layers.{i}.layer_scalar", "blk.{i}.layer_output_scale.weight"),
)


def names(spec: ModelSpec) -> dict[str, Name]:
    """The name table of this spec."""
    return expand(spec, ROWS)


FAMILY = Family(
    name="gemma4",
    model_types=("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    architectures=("gemma4",),
    prefixes=("model.language_model.", "language_model.model.", "model.", ""),
    from_config=from_config,
    from_header=from_header,
    to_metadata=to_metadata,
    names=names,
    ignored=(
        "model.vision_tower.",
        "model.vision_embedder.",
        "model.embed_vision.",
        "model.audio_tower.",
        "model.embed_audio.",
    ),
)
