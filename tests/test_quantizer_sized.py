"""Prices of schemes against what replacing a group really costs, and recipes within a budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import MemorySource
from test_quantizer_blockwise import calibration, source
from torch import Tensor

from halfbyte.errors import DoesNotFitError
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.quantizer.calibrate import Reader, Sampling
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.sensitivity import CANDIDATES, priced, shared_of
from halfbyte.quantizer.sized import allocated
from halfbyte.specs import recipe_of


def log_p(decoder: Decoder, windows: list[list[int]]) -> Tensor:
    spans = [Span(start=0, count=len(window), pages=(), ring=0) for window in windows]
    rows = Rows(token_ids=[token for window in windows for token in window], spans=spans)
    caches = [ScratchKV() for _ in decoder.spec.layers]
    with torch.no_grad():
        return decoder.logits(decoder.states(rows, caches)).log_softmax(-1)


def test_prices_are_the_divergence_that_is_measured(stories260k: Path, tmp_path: Path) -> None:
    """Each group of a trained model replaced alone, on the same windows: also in absolute terms."""
    model = read(stories260k)
    assert model.assets is not None
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time, there was a little dog who liked to play outside. " * 60)
    sampling = Sampling(samples=4, window=128)
    windows = [list(w) for w in Reader(model.assets).read([story], sampling).windows]
    costs = priced(model, windows, tmp_path, device="cpu")
    ops = ObservedOps()
    decoder = load(model, ops)
    before = log_p(decoder, windows)
    packed = {"embed.weight": decoder.weights.embed} | {
        f"layers.{i}.{part}.weight": linear.weight
        for i, layer in enumerate(decoder.weights.layers)
        for part, linear in (("attn.q", layer.q), ("attn.k", layer.k), ("attn.v", layer.v),
                             ("attn.o", layer.o), ("mlp.gate", layer.gate), ("mlp.up", layer.up))
        if linear is not None
    }  # fmt: skip
    pairs: list[tuple[float, float]] = []
    for group in shared_of(model):
        if not set(group.shapes) <= set(packed):
            continue
        originals = {name: packed[name].dense.clone() for name in group.shapes}
        for name, scheme in group.schemes_for("q4_0").items():
            stored = encode(originals[name], scheme, method="search")
            packed[name].dense.copy_(decode(stored))
        after = log_p(decoder, windows)
        measured = float((before.exp() * (before - after)).sum(-1).mean())
        pairs.append((costs[group.name, "q4_0"], measured))
        for name, dense in originals.items():
            packed[name].dense.copy_(dense)
    predicted, measured = np.array(pairs).T
    assert len(pairs) == 16
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.9
    assert 0.6 < predicted.sum() / measured.sum() < 1.6


@pytest.mark.parametrize("name", ["llama", "gemma4-everything"])
def test_better_schemes_cost_less(name: str, tmp_path: Path) -> None:
    model = source(name)
    costs = priced(model, calibration().windows, tmp_path, device="cpu")
    groups = shared_of(model)
    totals = [sum(costs[group.name, candidate] for group in groups) for candidate in CANDIDATES]
    assert min(costs.values()) >= 0
    assert totals[0] >= totals[1] and totals[0] > totals[3]


def test_a_budget_is_kept_to_the_byte(tmp_path: Path) -> None:
    model: MemorySource = source("gemma4-unified")
    costs = priced(model, calibration().windows, tmp_path, device="cpu")
    base = recipe_of("q4_0")

    def stored(recipe: object) -> int:
        return sum(
            recipe.scheme_for(t.name, t.shape).bytes(t.shape)  # type: ignore[attr-defined]
            for t in model.spec.tensors()
        )

    pure = stored(recipe_of("q4_0-pure"))
    last = float("inf")
    for budget in (pure, int(pure * 1.3), int(pure * 1.8), 4 * pure):
        found = allocated(model, base, costs, budget)
        assert found.bytes == stored(found.recipe) <= budget
        assert found.cost <= last
        last = found.cost
        assert found.cost == pytest.approx(
            sum(costs[part.group.name, part.option.scheme] for part in found.parts)
        )
    with pytest.raises(DoesNotFitError, match=f"the smallest choice takes {pure}"):
        allocated(model, base, costs, pure - 1)
