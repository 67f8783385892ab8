"""Published config.json files, without the fields that say nothing of the text model's shape."""

from __future__ import annotations

from typing import Any

TOWER = {"model_type": "siglip_vision_model"}

LLAMA_32_1B: dict[str, Any] = {
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
MISTRAL_7B: dict[str, Any] = {
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
QWEN2_05B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "sliding_window": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}


def _qwen3(hidden: int, width: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": width,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }


GEMMA3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GEMMA3_270M: dict[str, Any] = {
    **{key: value for key, value in GEMMA3_1B.items() if key != "sliding_window_pattern"},
    "_sliding_window_pattern": 6,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "layer_types": ([*["sliding_attention"] * 5, "full_attention"] * 3),
    "use_bidirectional_attention": False,
}


def _gemma3(hidden: int, width: int, layers: int, **others: int) -> dict[str, Any]:
    """The larger sizes leave out whatever is the config class's default."""
    return {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **others,
        },
        "vision_config": TOWER,
    }


def _gemma4(kind: str, period: int, **fields: Any) -> dict[str, Any]:
    layers: int = fields["num_hidden_layers"]
    return {
        "model_type": kind,
        "text_config": {
            "model_type": f"{kind}_text",
            "attention_bias": False,
            "attention_k_eq_v": True,
            "enable_moe_block": False,
            "final_logit_softcapping": 30.0,
            "global_head_dim": 512,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size_per_layer_input": 0,
            "layer_types": [
                "sliding_attention" if (index + 1) % period else "full_attention"
                for index in range(layers)
            ],
            "max_position_embeddings": 262144,
            "num_global_key_value_heads": None,
            "num_kv_shared_layers": 0,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": 1024,
            "tie_word_embeddings": True,
            "use_bidirectional_attention": "vision",
            "use_double_wide_mlp": False,
            "vocab_size": 262144,
            "vocab_size_per_layer_input": 262144,
            **fields,
        },
        "vision_config": TOWER,
    }


_EDGE: dict[str, Any] = {
    "attention_k_eq_v": False,
    "hidden_size_per_layer_input": 256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "sliding_window": 512,
    "use_bidirectional_attention": None,
}

# name -> (config.json, billions of parameters of the text model)
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "llama-3.2-1b": (LLAMA_32_1B, 1.236),
    "mistral-7b": (MISTRAL_7B, 7.242),
    "qwen2-0.5b": (QWEN2_05B, 0.494),
    "qwen3-0.6b": (_qwen3(1024, 3072, 28, 16, tied=True), 0.596),
    "qwen3-4b": (_qwen3(2560, 9728, 36, 32, tied=True), 4.022),
    "qwen3-8b": (_qwen3(4096, 12288, 36, 32, tied=False), 8.191),
    "gemma3-270m": (GEMMA3_270M, 0.268),
    "gemma3-1b": (GEMMA3_1B, 1.0),
    "gemma3-4b": (_gemma3(2560, 10240, 34), 3.88),
    "gemma3-12b": (
        _gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8),
        11.766,
    ),
    "gemma3-27b": (
        _gemma3(
            5376,
            21504,
            62,
            num_attention_heads=32,
            num_key_value_heads=16,
            head_dim=128,
            query_pre_attn_scalar=168,
        ),
        27.009,
    ),
    "gemma4-e2b": (
        _gemma4(
            "gemma4",
            5,
            **_EDGE,
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=35,
            num_key_value_heads=1,
            num_kv_shared_layers=20,
            use_double_wide_mlp=True,
        ),
        4.629,
    ),
    "gemma4-e4b": (
        _gemma4(
            "gemma4",
            6,
            **_EDGE,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=42,
            num_key_value_heads=2,
            num_kv_shared_layers=18,
        ),
        7.463,
    ),
    "gemma4-12b": (
        _gemma4(
            "gemma4_unified",
            6,
            hidden_size=3840,
            intermediate_size=15360,
            num_attention_heads=16,
            num_hidden_layers=48,
            num_key_value_heads=8,
            num_global_key_value_heads=1,
        ),
        11.907,
    ),
    "gemma4-26b-a4b": (
        _gemma4(
            "gemma4",
            6,
            enable_moe_block=True,
            hidden_size=2816,
            intermediate_size=2112,
            moe_intermediate_size=704,
            num_attention_heads=16,
            num_experts=128,
            num_hidden_layers=30,
            num_key_value_heads=8,
            num_global_key_value_heads=2,
            top_k_experts=8,
        ),
        25.233,
    ),
    "gemma4-31b": (
        _gemma4(
            "gemma4",
            6,
            hidden_size=5376,
            intermediate_size=21504,
            num_attention_heads=32,
            num_hidden_layers=60,
            num_key_value_heads=16,
            num_global_key_value_heads=4,
        ),
        30.697,
    ),
}


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the text model."""
    return config.get("text_config", config)
