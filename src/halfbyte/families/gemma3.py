"""Gemma 3, text models of every size (270M to 27B) and the text part of a multimodal checkpoint.

Five sliding layers to one global layer, with a rope base for each kind; the larger sizes divide the
global angles by 8. Norms before and after each part and on q and k, all of which multiply by 1 + w:
our weights and the GGUF's are the effective multipliers. The attention scale is its own field.

Both dialects of config.json are read: `rope_theta` / `rope_local_base_freq` / `rope_scaling` /
`sliding_window_pattern`, and `rope_parameters` / `layer_types`. llama.cpp knows no key for the
scale: its rule (head dim, but hidden / heads for the 27B, which it knows by its 62 layers) is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.family import Family, Header, with_ropes
from halfbyte.families.fields import Fields, layer_types
from halfbyte.families.multiplier import embed_scale_of
from halfbyte.families.names import BOTH_NORMS, COMMON, Name, expand
from halfbyte.families.rope import rope_of, rope_parameters, stored_rope
from halfbyte.specs import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, RopeSpec

PATTERN = 6
LAYERS_OF_27B = 62
GLOBAL_THETA, LOCAL_THETA = 1000000.0, 10000.0
# The sizes with the long context divide the global angles, those with the short one do not.
GLOBAL_FACTORS = {131072: 8.0, 32768: None}


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a gemma3 or gemma3_text config.json; absent fields are the class's defaults."""
    outer = Fields(config)
    fields = outer.table("text_config") if outer.get("text_config") else outer
    _refuse_unsupported(fields)
    ropes = _config_ropes(fields)
    window = fields.integer("sliding_window", 4096)
    layers = [
        _layer(
            heads=fields.integer("num_attention_heads", 8),
            kv_heads=fields.integer("num_key_value_heads", 4),
            head_dim=fields.integer("head_dim", 256),
            rope=ropes[sliding],
            scale=fields.number("query_pre_attn_scalar", 256) ** -0.5,
            window=window if sliding else None,
            width=fields.integer("intermediate_size"),
        )
        for sliding in _config_pattern(fields)
    ]
    return _model(
        hidden=fields.integer("hidden_size"),
        vocab=fields.integer("vocab_size", 262208),
        context=fields.integer("max_position_embeddings", 131072),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings", True),
        layers=layers,
        logit_softcap=fields.optional("final_logit_softcapping"),
    )


def _refuse_unsupported(fields: Fields) -> None:
    refused = {
        "attention biases": fields.flag("attention_bias"),
        "bidirectional attention": fields.flag("use_bidirectional_attention"),
        "a soft-cap on attention": fields.get("attn_logit_softcapping") is not None,
    }
    for what, present in refused.items():
        if present:
            raise UnsupportedError(f"{what} in gemma3")
    activation = fields.get("hidden_activation", "gelu_pytorch_tanh")
    if activation != "gelu_pytorch_tanh":
        raise UnsupportedError(f"activation '{activation}' in gemma3")


def _config_pattern(fields: Fields) -> list[bool]:
    """For every layer, whether it slides."""
    count = fields.layers("num_hidden_layers")
    types = fields.sequence("layer_types")
    if types is None:
        return _pattern(fields.integer("sliding_window_pattern", PATTERN), count)
    if len(types) != count or set(types) - {"sliding_attention", "full_attention"}:
        raise IntegrityError(f"layer_types does not describe {count} sliding or full layers")
    return [name == "sliding_attention" for name in types]


def _pattern(period: int, count: int) -> list[bool]:
    return [(index + 1) % period != 0 for index in range(count)]


def _config_ropes(fields: Fields) -> dict[bool, RopeSpec]:
    """The rope of sliding layers and of the others, from either dialect."""
    head_dim = fields.integer("head_dim", 256)
    tables = fields.table("rope_parameters")
    sliding, full = tables.table("sliding_attention"), tables.table("full_attention")
    if not full.values:
        full = fields.table("rope_scaling")
    return {
        True: rope_of(sliding, head_dim, fields.number("rope_local_base_freq", LOCAL_THETA)),
        False: rope_of(full, head_dim, fields.number("rope_theta", GLOBAL_THETA)),
    }


def from_header(header: Header) -> ModelSpec:
    """The spec of a GGUF of architecture gemma3."""
    fields = header.fields()
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length")
    count = fields.layers("block_count")
    window = fields.get("attention.sliding_window")
    ropes = {
        True: RopeSpec(theta=fields.number("rope.freq_base_swa", LOCAL_THETA)),
        False: stored_rope(header, head_dim, GLOBAL_THETA),
    }
    layers = [
        _layer(
            heads=heads,
            kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            rope=ropes[sliding],
            scale=_implied_scale(hidden, heads, head_dim, count),
            window=fields.integer("attention.sliding_window") if sliding else None,
            width=fields.integer("feed_forward_length"),
        )
        for sliding in ([False] * count if window is None else _header_pattern(fields, count))
    ]
    return _model(
        hidden=hidden,
        vocab=header.shapes["token_embd.weight"][0],
        context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in header.shapes,
        layers=layers,
        logit_softcap=fields.optional("final_logit_softcapping"),
    )


def _header_pattern(fields: Fields, count: int) -> list[bool]:
    key = "attention.sliding_window_pattern"
    if not isinstance(fields.get(key), Sequence):
        return _pattern(fields.integer(key, PATTERN), count)
    stored = fields.sequence(key) or ()
    if len(stored) != count:
        raise IntegrityError(f"{key} does not describe {count} layers")
    return [bool(sliding) for sliding in stored]


def _implied_scale(hidden: int, heads: int, head_dim: int, count: int) -> float:
    return (hidden // heads if count == LAYERS_OF_27B else head_dim) ** -0.5


def to_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF metadata of this spec, without the architecture's prefix.

    Raises `UnsupportedError` for what the architecture's readers cannot express: another attention
    scale than the implied one, or a rope scaling that is not linear.
    """
    kinds = [layer.attention for layer in spec.layers]
    full = next((kind for kind in kinds if kind.window is None), kinds[-1])
    sliding = next((kind for kind in kinds if kind.window is not None), None)
    implied = _implied_scale(spec.hidden, full.heads, full.head_dim, len(kinds))
    if abs(full.scale / implied - 1) > 1e-6:
        raise UnsupportedError(f"the attention scale {full.scale:g} in a GGUF of 'gemma3'")
    metadata: dict[str, Any] = {
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "block_count": len(kinds),
        "feed_forward_length": spec.layers[0].mlp.width,
        "attention.head_count": full.heads,
        "attention.head_count_kv": full.kv_heads,
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.freq_base": full.rope.theta,
    }
    if full.rope.divisors is not None:
        if full.rope.linear_factor is None:
            raise UnsupportedError("a rope scaling that is not linear in a GGUF of 'gemma3'")
        metadata["rope.scaling.type"] = "linear"
        metadata["rope.scaling.factor"] = full.rope.linear_factor
    if sliding is not None:
        metadata["attention.sliding_window"] = sliding.window
        metadata["attention.sliding_window_pattern"] = [kind.window is not None for kind in kinds]
        metadata["rope.freq_base_swa"] = sliding.rope.theta
    if spec.logit_softcap is not None:
        metadata["final_logit_softcapping"] = spec.logit_softcap
    return metadata


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of this spec, as a text model."""
    kinds = [layer.attention for layer in spec.layers]
    full = next((kind for kind in kinds if kind.window is None), None)
    sliding = next((kind for kind in kinds if kind.window is not None), None)
    any_kind = full or sliding or kinds[0]
    ropes = {
        "full_attention": full.rope if full else RopeSpec(theta=GLOBAL_THETA),
        "sliding_attention": sliding.rope if sliding else RopeSpec(theta=LOCAL_THETA),
    }
    return {
        "model_type": "gemma3_text",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.layers[0].mlp.width,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": any_kind.heads,
        "num_key_value_heads": any_kind.kv_heads,
        "head_dim": any_kind.head_dim,
        "query_pre_attn_scalar": round(any_kind.scale**-2),
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": sliding.window if sliding else 4096,
        "layer_types": layer_types([kind.window for kind in kinds]),
        "rope_parameters": {name: rope_parameters(rope) for name, rope in ropes.items()},
        "final_logit_softcapping": spec.logit_softcap,
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
) -> ModelSpec:
    return ModelSpec(
        family="gemma3",
        architecture="gemma3",
        hidden=hidden,
        vocab=vocab,
        context=context,
        norm_eps=norm_eps,
        tied_head=tied_head,
        layers=tuple(layers),
        embed_scale=embed_scale_of(hidden),
        logit_softcap=logit_softcap,
    )


def _layer(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope: RopeSpec,
    scale: float,
    window: int | None,
    width: int,
) -> LayerSpec:
    return LayerSpec(
        attention=AttentionSpec(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rope=rope,
            scale=scale,
            window=window,
            qk_norm=True,
        ),
        mlp=MLPSpec(width=width, activation="gelu_tanh"),
        post_norms=True,
    )


def published(spec: ModelSpec) -> ModelSpec:
    """Base 1e4 and no scaling on sliding layers, 1e6 on the others, divided by 8 in 4B and up."""

    def rope(attention: AttentionSpec) -> RopeSpec:
        if attention.window is not None:
            return RopeSpec(theta=LOCAL_THETA)
        if spec.context not in GLOBAL_FACTORS:
            return replace(attention.rope, theta=GLOBAL_THETA)
        factor = GLOBAL_FACTORS[spec.context]
        table = {} if factor is None else {"rope_type": "linear", "factor": factor}
        return rope_of(Fields(table), attention.head_dim, GLOBAL_THETA)

    return with_ropes(spec, rope)


def names(spec: ModelSpec) -> dict[str, Name]:
    """The name table of this spec."""
    return expand(spec, (*COMMON, *BOTH_NORMS), norm_offset=1.0)


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3", "gemma3_text"),
    architectures=("gemma3",),
    prefixes=("model.language_model.", "language_model.model.", "model.", ""),
    from_config=from_config,
    from_header=from_header,
    to_metadata=to_metadata,
    to_config=to_config,
    classes={"gemma3_text": "Gemma3ForCausalLM"},
    published=published,
    names=names,
    ignored=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
