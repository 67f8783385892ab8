"""Gemma 4, text models: 12B ("unified"), 31B, 26B-A4B, E2B and E4B.

Sliding layers and some global ones; global layers have a wider head, in the larger sizes fewer
key/value heads and no value projection (`attention_k_eq_v`), and a rope that rotates a quarter of
the pairs; q and k are normed with weights, v without; attention scale 1; norms before and after
each part; a scalar per layer; final soft-cap. Norm weights multiply as they are (not 1 + w).
26B-A4B has a mixture of experts beside each MLP. E2B and E4B have embeddings per layer, and their
last layers read the keys and values of the last layer before them that is of their kind.

Both dialects of config.json are read: `global_head_dim` / `num_global_key_value_heads`, and the
`per_layer_config` map that Transformers writes since 5.22. The embedding multiplier is sqrt(hidden)
rounded to bf16, as the trained model saw it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isinf
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.family import Family, Header, with_ropes
from halfbyte.families.fields import Fields, layer_types
from halfbyte.families.multiplier import embed_scale_of
from halfbyte.families.names import BOTH_NORMS, COMMON, Name, expand, of_layers
from halfbyte.families.rope import rope_of, rope_parameters
from halfbyte.specs import (
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    PerLayerSpec,
    RopeSpec,
)

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
    sources = _kv_sources(
        [name == "sliding_attention" for name in types], fields.count("num_kv_shared_layers", 0)
    )
    layers: list[LayerSpec] = []
    for index, name in enumerate(types):
        full = name == "full_attention"
        shared = sources[index] is not None
        head_dim = overrides[index].integer("head_dim", fields.integer("head_dim", 256))
        kv_heads = overrides[index].integer(
            "num_key_value_heads", fields.integer("num_key_value_heads", 4)
        )
        wide = shared and fields.flag("use_double_wide_mlp")
        layers.append(
            _layer(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=_config_rope(fields, name, head_dim),
                window=None if full else window,
                shares_kv=full and not shared and fields.flag("attention_k_eq_v"),
                width=fields.integer("intermediate_size") * (2 if wide else 1),
                experts=_config_experts(fields, hidden),
                kv_source=sources[index],
            )
        )
    return _model(
        hidden=hidden,
        vocab=fields.integer("vocab_size", 262144),
        context=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings", True),
        layers=layers,
        logit_softcap=fields.optional("final_logit_softcapping"),
        per_layer_width=fields.count("hidden_size_per_layer_input"),
    )


def _refuse_unsupported(fields: Fields) -> None:
    vocab = fields.integer("vocab_size", 262144)
    refused = {
        "a smaller table of per-layer embeddings": fields.count("hidden_size_per_layer_input") > 0
        and fields.integer("vocab_size_per_layer_input", 262144) != vocab,
        "attention biases": fields.flag("attention_bias"),
        "bidirectional text attention": fields.get("use_bidirectional_attention") == "all",
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{what} in gemma4")
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
    stored = fields.table("per_layer_config")
    if stored.values:
        # Transformers pads the numbers with zeros: "05".
        keys = {str(key).lstrip("0") or "0": key for key in stored.values}
        return [stored.table(keys.get(str(index), "")) for index in range(len(types))]
    full: dict[str, Any] = {"head_dim": fields.integer("global_head_dim", 512)}
    if fields.flag("attention_k_eq_v") and fields.get("num_global_key_value_heads") is not None:
        full["num_key_value_heads"] = fields.integer("num_global_key_value_heads")
    return [Fields(full if name == "full_attention" else {}) for name in types]


def _kv_sources(pattern: Sequence[bool], shared: int) -> list[int | None]:
    """For every layer, whose keys and values it reads: the last `shared` have none of their own.

    As in Transformers, no layer is shared if all would be.
    """
    own = len(pattern) - shared if shared < len(pattern) else len(pattern)
    last = {sliding: index for index, sliding in enumerate(pattern[:own])}
    if not set(pattern[own:]) <= last.keys():
        raise IntegrityError(f"the first {own} layers lack a kind that a later one shares")
    return [None if index < own else last[sliding] for index, sliding in enumerate(pattern)]


def _config_experts(fields: Fields, hidden: int) -> ExpertSpec | None:
    if not fields.flag("enable_moe_block"):
        return None
    return _experts(
        count=fields.integer("num_experts"),
        used=fields.integer("top_k_experts"),
        width=fields.integer("moe_intermediate_size"),
        hidden=hidden,
    )


def _config_rope(fields: Fields, layer_type: str, head_dim: int) -> RopeSpec:
    tables = fields.get("rope_parameters")
    default = FULL_ROPE if layer_type == "full_attention" else SLIDING_ROPE
    table = Fields(default) if tables is None else Fields(tables).table(layer_type)
    return rope_of(table, head_dim, 10000.0)


def from_header(header: Header) -> ModelSpec:
    """The spec of a GGUF of architecture gemma4."""
    if header.rope_divisors is None:
        raise IntegrityError("rope_freqs.weight is missing; the global layers need it")
    return described(header)


def described(header: Header) -> ModelSpec:
    """The spec that the metadata and shapes of a header describe, this one's or its drafter's."""
    fields = header.fields()
    count = fields.layers("block_count")
    pattern = fields.sequence("attention.sliding_window_pattern")
    if pattern is None or len(pattern) != count:
        raise IntegrityError(f"attention.sliding_window_pattern does not describe {count} layers")
    kv_heads = fields.per_layer("attention.head_count_kv", count)
    widths = fields.per_layer("feed_forward_length", count)
    hidden = fields.integer("embedding_length")
    sources = _kv_sources(pattern, fields.count("attention.shared_kv_layers", 0))
    layers = [
        _layer(
            heads=fields.integer("attention.head_count"),
            kv_heads=kv_heads[index],
            head_dim=fields.integer(f"attention.key_length{'_swa' if sliding else ''}"),
            rope=_header_rope(header, fields, bool(sliding)),
            window=fields.integer("attention.sliding_window") if sliding else None,
            shares_kv=sources[index] is None and f"blk.{index}.attn_v.weight" not in header.shapes,
            width=widths[index],
            experts=_header_experts(header, fields, index),
            kv_source=sources[index],
        )
        for index, sliding in enumerate(pattern)
    ]
    return _model(
        hidden=hidden,
        vocab=header.shapes["token_embd.weight"][0],
        context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in header.shapes,
        layers=layers,
        logit_softcap=fields.optional("final_logit_softcapping"),
        per_layer_width=fields.count("embedding_length_per_layer_input", 0),
    )


def _header_experts(header: Header, fields: Fields, index: int) -> ExpertSpec | None:
    """llama.cpp takes a layer to have experts if it has a router."""
    if f"blk.{index}.ffn_gate_inp.weight" not in header.shapes:
        return None
    return _experts(
        count=fields.integer("expert_count"),
        used=fields.integer("expert_used_count"),
        width=fields.integer("expert_feed_forward_length"),
        hidden=fields.integer("embedding_length"),
    )


def _header_rope(header: Header, fields: Fields, sliding: bool) -> RopeSpec:
    if sliding:
        return RopeSpec(theta=fields.number("rope.freq_base_swa", 10000.0))
    theta = fields.number("rope.freq_base", 1000000.0)
    if header.rope_divisors is None:
        return RopeSpec(theta=theta)
    rotated = sum(not isinf(value) for value in header.rope_divisors)
    scaling = f"proportional, {rotated} of {len(header.rope_divisors)} pairs rotate"
    return RopeSpec(theta=theta, divisors=header.rope_divisors, scaling=scaling)


def to_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF metadata of this spec, without the architecture's prefix.

    Raises `UnsupportedError` for what the architecture's readers cannot express: no sliding layer,
    full layers whose rope is not given by divisors, or keys and values shared with another than
    the last full and the last sliding layer that have their own.
    """
    if not spec.windows or spec.layers[-1].attention.rope.divisors is None:
        raise UnsupportedError("a gemma4 GGUF needs sliding layers and proportional rope")
    own = len(spec.layers) - _shared(spec)
    for layer in spec.layers[own:]:
        if layer.kv_source != own - (1 if layer.attention.window is None else 2):
            raise UnsupportedError("a gemma4 GGUF shares the keys of its last two own layers")
    return description(spec)


def _shared(spec: ModelSpec) -> int:
    return sum(layer.kv_source is not None for layer in spec.layers)


def description(spec: ModelSpec) -> dict[str, Any]:
    """What `described` reads, of this architecture's spec or its drafter's."""
    full = spec.layers[-1].attention
    sliding = next((it.attention for it in spec.layers if it.attention.window is not None), full)
    widths = [layer.mlp.width for layer in spec.layers]
    metadata: dict[str, Any] = {
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "block_count": len(spec.layers),
        "feed_forward_length": widths if len(set(widths)) > 1 else widths[0],
        "attention.head_count": full.heads,
        "attention.head_count_kv": [layer.attention.kv_heads for layer in spec.layers],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": sliding.head_dim,
        "attention.value_length_swa": sliding.head_dim,
        "attention.sliding_window_pattern": [
            layer.attention.window is not None for layer in spec.layers
        ],
        "attention.shared_kv_layers": _shared(spec),
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "embedding_length_per_layer_input": spec.per_layer.width if spec.per_layer else 0,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": sliding.head_dim,
        "rope.freq_base": full.rope.theta,
        "rope.freq_base_swa": sliding.rope.theta,
    }
    if sliding.window is not None:
        metadata["attention.sliding_window"] = sliding.window
    experts = spec.layers[0].experts
    if experts is not None:
        metadata["expert_count"] = experts.count
        metadata["expert_used_count"] = experts.used
        metadata["expert_feed_forward_length"] = experts.width
    if spec.logit_softcap is not None:
        metadata["final_logit_softcapping"] = spec.logit_softcap
    return metadata


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of this spec, as a text model with every field that has a default."""
    layers = spec.layers
    full = layers[-1].attention
    sliding = next((each.attention for each in layers if each.attention.window is not None), None)
    if sliding is None:
        raise UnsupportedError("a gemma4 config.json needs sliding layers")
    shared = sum(layer.kv_source is not None for layer in layers)
    shares_kv = any(layer.attention.shares_kv for layer in layers)
    experts = layers[0].experts
    widths = [layer.mlp.width for layer in layers]
    return {
        "model_type": "gemma4_text",
        "hidden_size": spec.hidden,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": widths[-1] != widths[0],
        "num_hidden_layers": len(layers),
        "num_kv_shared_layers": shared,
        "num_attention_heads": full.heads,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "num_key_value_heads": sliding.kv_heads,
        "num_global_key_value_heads": full.kv_heads if shares_kv else None,
        "attention_k_eq_v": shares_kv,
        "vocab_size": spec.vocab,
        "vocab_size_per_layer_input": spec.vocab,
        "hidden_size_per_layer_input": spec.per_layer.width if spec.per_layer else 0,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": sliding.window,
        "layer_types": layer_types([each.attention.window for each in layers]),
        "rope_parameters": {
            "full_attention": rope_parameters(full.rope),
            "sliding_attention": rope_parameters(sliding.rope),
        },
        "final_logit_softcapping": spec.logit_softcap,
        "enable_moe_block": experts is not None,
        "num_experts": experts.count if experts else None,
        "top_k_experts": experts.used if experts else None,
        "moe_intermediate_size": experts.width if experts else None,
    }


def _model(
    *,
    hidden: int,
    vocab: int,
    context: int,
    norm_eps: float,
    tied_head: bool,
    layers: Sequence[LayerSpec],
    logit_softcap: float | None,
    per_layer_width: int,
) -> ModelSpec:
    return ModelSpec(
        family="gemma4",
        architecture="gemma4",
        hidden=hidden,
        vocab=vocab,
        context=context,
        norm_eps=norm_eps,
        tied_head=tied_head,
        layers=tuple(layers),
        embed_scale=embed_scale_of(hidden),
        logit_softcap=logit_softcap,
        per_layer=_per_layer(per_layer_width, hidden) if per_layer_width else None,
    )


def _per_layer(width: int, hidden: int) -> PerLayerSpec:
    return PerLayerSpec(width=width, token_scale=embed_scale_of(width), context_scale=hidden**-0.5)


def _experts(*, count: int, used: int, width: int, hidden: int) -> ExpertSpec:
    if used > count:
        raise IntegrityError(f"a row cannot go through {used} of {count} experts")
    return ExpertSpec(count=count, used=used, width=width, score_scale=hidden**-0.5)


def _layer(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope: RopeSpec,
    window: int | None,
    shares_kv: bool,
    width: int,
    experts: ExpertSpec | None,
    kv_source: int | None,
) -> LayerSpec:
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
        experts=experts,
        kv_source=kv_source,
        post_norms=True,
        scalar=True,
    )


# 26B-A4B
EXPERTS = of_layers(
    ("mlp_own_norm.weight", "post_feedforward_layernorm_1.weight", "post_ffw_norm_1.weight"),
    ("router.scale", "router.scale", "ffn_gate_inp.scale"),
    ("router.weight", "router.proj.weight", "ffn_gate_inp.weight"),
    ("experts_norm.weight", "pre_feedforward_layernorm_2.weight", "pre_ffw_norm_2.weight"),
    ("experts.gate_up.weight", "experts.gate_up_proj", "ffn_gate_up_exps.weight"),
    ("experts.down.weight", "experts.down_proj", "ffn_down_exps.weight"),
    ("experts.scale", "router.per_expert_scale", "ffn_down_exps.scale"),
    ("experts_own_norm.weight", "post_feedforward_layernorm_2.weight", "post_ffw_norm_2.weight"),
)
# E2B and E4B
PER_LAYER = (
    ("per_layer.embed.weight", "embed_tokens_per_layer.weight", "per_layer_token_embd.weight"),
    (
        "per_layer.project.weight",
        "per_layer_model_projection.weight",
        "per_layer_model_proj.weight",
    ),
    ("per_layer.norm.weight", "per_layer_projection_norm.weight", "per_layer_proj_norm.weight"),
    *of_layers(
        ("per_layer.gate.weight", "per_layer_input_gate.weight", "inp_gate.weight"),
        ("per_layer.out.weight", "per_layer_projection.weight", "proj.weight"),
        ("per_layer.norm.weight", "post_per_layer_input_norm.weight", "post_norm.weight"),
    ),
)
SCALAR = of_layers(("scalar", "layer_scalar", "layer_output_scale.weight"))
ROWS = (*COMMON, *BOTH_NORMS, *EXPERTS, *PER_LAYER, *SCALAR)


def published(spec: ModelSpec) -> ModelSpec:
    """The ropes that every published size has."""
    return with_ropes(
        spec,
        lambda attention: rope_of(
            Fields(FULL_ROPE if attention.window is None else SLIDING_ROPE),
            attention.head_dim,
            10000.0,
        ),
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
    to_config=to_config,
    classes={
        "gemma4_text": "Gemma4ForCausalLM",
        "gemma4_unified_text": "Gemma4UnifiedForCausalLM",
    },
    names=names,
    published=published,
    ignored=(
        "model.vision_tower.",
        "model.vision_embedder.",
        "model.embed_vision.",
        "model.audio_tower.",
        "model.embed_audio.",
    ),
)
