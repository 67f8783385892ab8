"""One walk back: every weight is rounded for its inputs and for what hangs on its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_quantizer_blockwise import calibration, quantized, source

from halfbyte.formats.checkpoint import Replaced
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.codec import decode
from halfbyte.quantizer import quantization
from halfbyte.quantizer.block import BORROWED, Block
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.stages import stage_of
from halfbyte.quantizer.two_sided import TALL
from halfbyte.specs import recipe_of


class Looking:
    """Keeps the inputs and gradients of every product."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def top(
        self, states: torch.Tensor, probabilities: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        pass

    def behind(self, block: Block, gradient: torch.Tensor) -> None:
        pass

    def layer(
        self, block: Block, passed: Sequence[Passed], gradients: Sequence[torch.Tensor]
    ) -> None:
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            key = names[id(product.weight)], product.expert
            self.seen[key] = product.input.detach(), gradient.clone()

    def left(self, block: Block) -> None:
        pass

    def entered(self, rows: Rows, gradient: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4-unified", "gemma4-experts"])
def test_both_sides_of_every_weight(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def listen(name, weight, hessian, *rest, outputs=None):  # type: ignore[no-untyped-def]
        asked.setdefault(name, []).append((hessian, outputs))
        return solve(name, weight, hessian, *rest, outputs=outputs)

    monkeypatch.setattr(quantization, "solve", listen)
    original = source(name)
    made = quantized(original, tmp_path / "work", method="yaqa")
    looking, flow = Looking(), Flow(original.spec, calibration().windows, tmp_path)
    entered = {n: made.tensor(n) for n in made.schemes if stage_of(n) == "embed"}
    Walk(Replaced(original, entered), ObservedOps(), flow, seed=0).run(looking)
    names = {name for name, _ in looking.seen if name in asked}  # routers stay in f32
    assert names >= {f"layers.{i}.mlp.down.weight" for i in range(len(original.spec.layers))}
    for name in names:
        pairs = {e: pair for (key, e), pair in looking.seen.items() if key == name}
        totals, counts = [], []
        for e in range(len(asked[name])) if None not in pairs else [None]:
            x, g = pairs.get(e, (torch.zeros(0, 1), torch.zeros(0, 1)))
            counts.append(len(x))
            totals.append((x.T * g.square().sum(-1)) @ x if len(x) else torch.zeros(1))
        mean = sum(totals) / sum(counts)
        for (inputs, outputs), total, count in zip(asked[name], totals, counts, strict=True):
            expected = total / count if None in pairs else (
                (total + BORROWED * mean) / (count + BORROWED)
            )  # fmt: skip
            scale = float(expected.abs().max())
            torch.testing.assert_close(inputs / scale, expected / scale, rtol=1e-3, atol=1e-5)
            rows, width = original.weights[name].shape[-2:]
            assert (outputs is None) == (rows > TALL * width)
    x, g = looking.seen["layers.0.attn.o.weight", None]
    found = asked["layers.0.attn.o.weight"][0][1]
    assert found is not None
    expected = (g.T * x.square().sum(-1)) @ g / len(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    assert [name for name, _ in made.tensors()] == [t.name for t in original.spec.tensors()]


def test_everything_is_stored_as_the_recipe_says(tmp_path: Path) -> None:
    original, recipe = source("gemma4-everything"), recipe_of("q4_0")
    made = quantized(original, tmp_path / "work", recipe=recipe, method="yaqa")
    for name, q in made.tensors():
        assert q.scheme == recipe.scheme_for(name, q.shape)
        kept = original.weights[name]
        error = (decode(q) - kept).norm() / kept.norm()
        assert error < (0.3 if q.scheme.block > 1 else 2**-11), name
