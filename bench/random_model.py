"""Checkpoints of random weights in the dimensions of published models.

    python bench/random_model.py llama-3.2-1b ~/.cache/halfbyte/random/llama-3.2-1b

For measuring bytes and time: the weights mean nothing. Written tensor by tensor in bf16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.families import family_of, spec_of
from halfbyte.formats import safetensors
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
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
    },
    "gemma4-12b": {
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
    },
}
# As large as the real model's would not help: random weights only need to stay finite.
SPREAD = 0.02
CHUNK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.name]
    if arguments.layers is not None:
        config = {**config, "num_hidden_layers": arguments.layers}
    make(config, arguments.directory)


def make(config: dict[str, Any], directory: Path) -> None:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = spec_of(config)
    names = family_of(spec).names(spec)
    prefix = family_of(spec).prefixes[0]
    layout = {
        _stored_name(prefix, names[tensor.name].hf): (SCHEMES["bf16"], tensor.shape)
        for tensor in spec.tensors()
    }
    safetensors.write(
        directory / "model.safetensors", layout=layout, tensors=_tensors(spec, list(layout))
    )
    (directory / "config.json").write_text(json.dumps(config, indent=1))


def _stored_name(prefix: str, name: str) -> str:
    return name if name.startswith("lm_head") else prefix + name


def _tensors(spec: ModelSpec, stored: list[str]) -> Iterator[tuple[str, QTensor]]:
    generator = np.random.default_rng(0)
    for name, tensor in zip(stored, spec.tensors(), strict=True):
        vector = len(tensor.shape) == 1
        data = np.empty(tensor.count, dtype=np.uint16)
        for start in range(0, tensor.count, CHUNK):
            stop = min(start + CHUNK, tensor.count)
            values = generator.standard_normal(stop - start, dtype=np.float32) * SPREAD
            data[start:stop] = ((1.0 + values if vector else values).view(np.uint32)) >> 16
        rows = tensor.count // tensor.shape[-1]
        yield name, QTensor(SCHEMES["bf16"], tensor.shape, data.view(np.uint8).reshape(rows, -1))


if __name__ == "__main__":
    main()
