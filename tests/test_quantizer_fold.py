"""Folding factors of channels changes the rounding, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, relative_error, source_of
from test_quantizer_blockwise import quantized, source

from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.fold import FOLDS, fold

IDS = np.random.default_rng(0).integers(0, 128, 40).tolist()


def logits(model: MemorySource) -> np.ndarray:
    decoder = load(model, ReferenceOps(exact_rows=False))
    rows = Rows(token_ids=IDS, spans=[Span(start=0, count=len(IDS), pages=(), ring=0)])
    own = [ScratchKV() for _ in model.spec.layers]
    sources = [i if x.kv_source is None else x.kv_source for i, x in enumerate(model.spec.layers)]
    with torch.no_grad():
        return decoder.logits(decoder.states(rows, [own[i] for i in sources])).numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_stays_as_it_is(name: str) -> None:
    original = source_of(oracle(CONFIGS[name]), CONFIGS[name])
    weights, generator = dict(original.weights), torch.Generator().manual_seed(1)
    for index in range(len(original.spec.layers)):
        for at in FOLDS:
            width = weights[f"layers.{index}.{at.group.parts[0]}.weight"].shape[1]
            factors = torch.rand(width, generator=generator) * 3 + 0.2
            changed = fold(weights, f"layers.{index}", at, factors)
            assert len(changed) >= 2
            weights |= changed
    assert relative_error(logits(replace(original, weights=weights)), logits(original)) < 2e-5


def test_awq_stores_scaled_columns_and_divided_norms(tmp_path: Path) -> None:
    """One channel is loud: its column is stored finer than a search alone would."""
    original = source("llama")
    original.weights["layers.0.mlp_norm.weight"][5] *= 40
    plain = quantized(original, tmp_path / "plain", method="search")
    scaled = quantized(original, tmp_path / "scaled", method="awq")
    norm = decode(scaled.tensor("layers.0.mlp_norm.weight"))
    factors = original.weights["layers.0.mlp_norm.weight"] / norm
    assert factors[5] > 1.5 * factors.median()
    up = original.weights["layers.0.mlp.up.weight"]

    def error(column: torch.Tensor) -> float:
        return float((column - up[:, 5]).norm() / up[:, 5].norm())

    down = original.weights["layers.0.mlp.down.weight"]
    found = decode(scaled.tensor("layers.0.mlp.up.weight"))
    rows = decode(scaled.tensor("layers.0.mlp.down.weight")).norm(dim=0) / down.norm(dim=0)
    column = found[:, 5] / factors[5] * rows
    assert error(column) < error(decode(plain.tensor("layers.0.mlp.up.weight"))[:, 5])
