"""Llama 2 and 3, Mistral, Qwen 2 and 3: pre-norm, rotary, grouped-query, SwiGLU.

The differences are data: Qwen 2 has biases on q, k and v, Qwen 3 norms on q and k instead; Llama 3
scales its rope; Mistral 0.1 has a sliding window. GGUF keeps the q and k rows of arch `llama` in
rotated-pair order, those of `qwen2` and `qwen3` in halves (llama.cpp's converters).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families.family import Family, Header, with_ropes
from halfbyte.families.fields import Fields, layer_types
from halfbyte.families.names import COMMON, Name, expand
from halfbyte.families.rope import rope_of, rope_parameters, stored_rope
from halfbyte.specs import AttentionSpec, LayerSpec, MLPSpec, ModelSpec, RopeSpec

QWEN = ("qwen2", "qwen3")
LLAMA3_THETA, LLAMA3_CONTEXT = 500000.0, 8192
PAIRED = frozenset({".attn.q.weight", ".attn.k.weight", ".attn.q.bias", ".attn.k.bias"})


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a llama, mistral, qwen2 or qwen3 config.json."""
    fields = Fields(config)
    kind = config["model_type"]
    if fields.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"activation '{config['hidden_act']}' in a {kind} model")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", 128 if kind == "qwen3" else hidden // heads)
    rope = _config_rope(fields, head_dim)
    windows = _config_windows(fields, kind)
    biased = kind == "qwen2" or fields.flag("attention_bias")
    layers = tuple(
        LayerSpec(
            attention=AttentionSpec(
                heads=heads,
                kv_heads=fields.integer("num_key_value_heads", heads),
                head_dim=head_dim,
                rope=rope,
                scale=head_dim**-0.5,
                window=window,
                qkv_bias=biased,
                output_bias=biased and kind != "qwen2",
                qk_norm=kind == "qwen3",
            ),
            mlp=MLPSpec(
                width=fields.integer("intermediate_size"),
                activation="silu",
                bias=fields.flag("mlp_bias"),
            ),
        )
        for window in windows
    )
    return ModelSpec(
        family="llama",
        architecture=kind if kind in QWEN else "llama",
        hidden=hidden,
        vocab=fields.integer("vocab_size"),
        context=fields.integer("max_position_embeddings"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied_head=fields.flag("tie_word_embeddings"),
        layers=layers,
    )


def _config_rope(fields: Fields, head_dim: int) -> RopeSpec:
    scaling = fields.table("rope_parameters" if fields.get("rope_parameters") else "rope_scaling")
    if scaling.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedError("a partial rotary factor in the llama family")
    return rope_of(scaling, head_dim, fields.number("rope_theta", 10000.0))


def _config_windows(fields: Fields, kind: str) -> list[int | None]:
    """The window of every layer. Llama has none; Qwen only with `use_sliding_window`."""
    count = fields.layers("num_hidden_layers")
    on = kind == "mistral" or (kind in QWEN and fields.flag("use_sliding_window"))
    window = fields.get("sliding_window") if on else None
    if window is None:
        return [None] * count
    window = fields.integer("sliding_window")
    types = fields.sequence("layer_types")
    if types is not None:
        if len(types) != count:
            raise IntegrityError(f"layer_types names {len(types)} of {count} layers")
        return [window if name == "sliding_attention" else None for name in types]
    first = fields.count("max_window_layers", 28) if kind in QWEN else 0
    return [window if index >= first else None for index in range(count)]


def from_header(header: Header) -> ModelSpec:
    """The spec of a GGUF of architecture llama, qwen2 or qwen3."""
    fields = header.fields()
    if fields.count("expert_count", 0):
        raise UnsupportedError("a mixture of experts in the llama family")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError("a partial rotary factor in the llama family")
    rope = stored_rope(header, head_dim, 10000.0)
    count = fields.layers("block_count")
    widths = fields.per_layer("feed_forward_length", count)
    kv_heads = fields.integer("attention.head_count_kv", heads)
    window = fields.get("attention.sliding_window")
    layers = tuple(
        LayerSpec(
            attention=AttentionSpec(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
                scale=head_dim**-0.5,
                window=None if window is None else fields.integer("attention.sliding_window"),
                qkv_bias=f"blk.{index}.attn_q.bias" in header.shapes,
                output_bias=f"blk.{index}.attn_output.bias" in header.shapes,
                qk_norm=f"blk.{index}.attn_q_norm.weight" in header.shapes,
            ),
            mlp=MLPSpec(
                width=width,
                activation="silu",
                bias=f"blk.{index}.ffn_gate.bias" in header.shapes,
            ),
        )
        for index, width in enumerate(widths)
    )
    return ModelSpec(
        family="llama",
        architecture=str(header.metadata["general.architecture"]),
        hidden=hidden,
        vocab=header.shapes["token_embd.weight"][0],
        context=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in header.shapes,
        layers=layers,
    )


def to_metadata(spec: ModelSpec) -> dict[str, Any]:
    """The GGUF metadata of this spec, without the architecture's prefix."""
    layer = spec.layers[0]
    attention = layer.attention
    metadata: dict[str, Any] = {
        "context_length": spec.context,
        "embedding_length": spec.hidden,
        "block_count": len(spec.layers),
        "feed_forward_length": layer.mlp.width,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "rope.dimension_count": attention.head_dim,
        "rope.freq_base": attention.rope.theta,
        "vocab_size": spec.vocab,
    }
    if len(spec.windows) > 1 or any(
        item.attention.window != attention.window for item in spec.layers
    ):
        raise UnsupportedError(f"windows that differ by layer in a GGUF of '{spec.architecture}'")
    if attention.window is not None:
        metadata["attention.sliding_window"] = attention.window
    if attention.rope.linear_factor is not None:
        metadata["rope.scaling.type"] = "linear"
        metadata["rope.scaling.factor"] = attention.rope.linear_factor
    elif attention.rope.divisors is not None and spec.architecture != "llama":
        raise UnsupportedError(f"rope scaling in a GGUF of '{spec.architecture}'")
    return metadata


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json of this spec. A llama with a window is called mistral."""
    layer = spec.layers[0]
    attention = layer.attention
    windowed = spec.architecture == "llama" and attention.window is not None
    config: dict[str, Any] = {
        "model_type": "mistral" if windowed else spec.architecture,
        "hidden_size": spec.hidden,
        "intermediate_size": layer.mlp.width,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": attention.rope.theta,
        "rope_parameters": rope_parameters(attention.rope),
        "tie_word_embeddings": spec.tied_head,
        "hidden_act": "silu",
        "attention_bias": attention.output_bias,
        "mlp_bias": layer.mlp.bias,
    }
    if spec.windows:
        config["sliding_window"] = spec.windows[0]
    if spec.windows and spec.architecture in QWEN:
        config["use_sliding_window"] = True
        config["layer_types"] = layer_types([item.attention.window for item in spec.layers])
    return config


def published(spec: ModelSpec) -> ModelSpec:
    """Llama 3.1 and later have the base of Llama 3 and a scaling that reaches beyond its context;
    without it (files made by old converters) they are right for 8192 positions only."""
    plain = RopeSpec(theta=LLAMA3_THETA)
    scaled = spec.layers[0].attention.rope != plain
    if spec.architecture != "llama" or spec.windows or scaled or spec.context <= LLAMA3_CONTEXT:
        return spec
    table: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": 32.0 if spec.tied_head else 8.0,  # 1B and 3B, and larger ones
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LLAMA3_CONTEXT,
    }
    return with_ropes(
        spec, lambda attention: rope_of(Fields(table), attention.head_dim, LLAMA3_THETA)
    )


def names(spec: ModelSpec) -> dict[str, Name]:
    """The name table of this spec."""
    return expand(spec, ROWS, paired=PAIRED if spec.architecture == "llama" else frozenset())


ROWS = (
    *COMMON,
    (
        "layers.{i}.mlp_norm.weight",
        "layers.{i}.post_attention_layernorm.weight",
        "blk.{i}.ffn_norm.weight",
    ),
)

FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", *QWEN),
    architectures=("llama", *QWEN),
    prefixes=("model.", ""),
    from_config=from_config,
    from_header=from_header,
    to_metadata=to_metadata,
    to_config=to_config,
    classes={
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    },
    names=names,
    published=published,
    ignored=("rotary_emb.inv_freq",),
)
