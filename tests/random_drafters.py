"""Drafters with random weights for any target: always wrong, but as fast as a trained one."""

from __future__ import annotations

import torch
from oracle import MemorySource

from halfbyte.families.gemma4_assistant import drafter_for
from halfbyte.specs import ModelSpec, recipe_of


def random_drafter(
    target: ModelSpec, *, hidden: int = 32, recipe: str = "f32", seed: int = 0, **options: object
) -> MemorySource:
    """A drafter that reads the last sliding layer, if there is one, and the last full one."""
    reads = [
        max(
            index
            for index, layer in enumerate(target.layers)
            if layer.kv_source is None and (layer.attention.window is None) is full
        )
        for full in (False, True)
        if any((layer.attention.window is None) is full for layer in target.layers)
    ]
    spec = drafter_for(target, reads=reads, hidden=hidden, width=2 * hidden, **options)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for tensor in spec.tensors():
        noise = torch.randn(tensor.shape, generator=generator)
        if len(tensor.shape) == 1:
            weights[tensor.name] = 1 + 0.3 * noise
        else:
            weights[tensor.name] = noise * tensor.shape[-1] ** -0.5
    if "head.tokens" in weights:
        order = torch.randperm(target.vocab, generator=generator)
        weights["head.tokens"] = order[: len(weights["head.tokens"])].float()
    return MemorySource(spec, weights, recipe_of(recipe))
