"""Adapter directories made by hand, to be damaged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from halfbyte.formats.lora import CONFIG, PREFIX, WEIGHTS
from halfbyte.formats.safetensors import dtype_of, write
from halfbyte.numerics.codec import encode
from halfbyte.specs import SCHEMES

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somebody/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
}


def tensors_of(
    shapes: Mapping[str, tuple[int, int]], rank: int = 2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random A and B of modules [outputs, inputs], under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, torch.Tensor] = {}
    for module, (outputs, inputs) in shapes.items():
        for part, shape in (("lora_A", (rank, inputs)), ("lora_B", (outputs, rank))):
            tensor = torch.randn(shape, generator=generator)
            named[f"{PREFIX}{module}.{part}.weight"] = tensor
    return named


def write_adapter(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any] = PLAIN,
    scheme: str = "f32",
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG).write_text(json.dumps(config))
    stored = SCHEMES[scheme]
    write(
        path / WEIGHTS,
        layout={name: (dtype_of(stored), tuple(t.shape)) for name, t in tensors.items()},
        tensors=((name, encode(tensor, stored).data) for name, tensor in tensors.items()),
    )
    return path
