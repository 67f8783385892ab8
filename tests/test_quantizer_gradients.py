"""The walk back, a layer at a time, gives what autograd gives of the whole model at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from oracle import CONFIGS, MemorySource, oracle, source_of
from test_quantizer_blockwise import WINDOW, calibration, source
from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.kernels.contract import Rows
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.load import load
from halfbyte.quantizer.block import Block
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING, Ends
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.gradients import Walk, tokens
from halfbyte.quantizer.observed import ObservedOps, Passed


class Whole:
    """The gradients of one forward of the whole model, from tokens drawn with the same seed."""

    def __init__(self, model: MemorySource, rows: Rows) -> None:
        ops = ObservedOps()
        decoder = load(model, ops)
        caches = [ScratchKV() for _ in model.spec.layers]
        x = decoder.enter(rows)[0].requires_grad_()
        inputs = decoder.enter(rows)[1]

        def run() -> Tensor:
            y, self.ends = x, []
            for index, weights in enumerate(decoder.weights.layers):
                y = decoder.attention(y, index, weights, rows, caches[index])
                y = decoder.feed_forward(y, index, weights, inputs)
                self.ends.append(y)
            return y

        end, self.passed = ops.passed_in(run)
        self.states = decoder.leave(end)
        log_p = decoder.logits(self.states).log_softmax(-1)
        chance = torch.Generator().manual_seed(5)
        drawn = tokens(log_p.detach().exp(), chance)
        outputs = [product.output for product in self.passed]
        leaves = [x, self.states, *self.ends, *outputs]
        self.entry, self.top, *found = torch.autograd.grad(log_p.gather(1, drawn).sum(), leaves)
        self.behind, self.inner = found[: len(self.ends)], found[len(self.ends) :]


class Looking:
    """Keeps all that a walk shows."""

    def __init__(self) -> None:
        self.states = self.gradient = self.above = torch.empty(0)
        self.inner: list[tuple[Tensor, Tensor]] = []
        self.order: list[int] = []
        self.behind_layers: dict[int, Tensor] = {}

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        self.states, self.above = states, gradient
        assert torch.allclose(probabilities.sum(-1), torch.ones(len(states)))

    def behind(self, block: Block, gradient: Tensor) -> None:
        self.behind_layers[block.index] = gradient.clone()

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        self.inner = [
            *((p.input, g.clone()) for p, g in zip(passed, gradients, strict=True)),
            *self.inner,
        ]

    def left(self, block: Block) -> None:
        self.order.append(block.index)

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        self.gradient = gradient.clone()


@pytest.mark.parametrize("name", ["llama", "gemma3-softcap", "gemma4-experts", "gemma4-unified"])
def test_a_walk_is_the_backward_of_the_whole(name: str, tmp_path: Path) -> None:
    model = source(name)
    flow = Flow(model.spec, calibration().windows, tmp_path)
    looking = Looking()
    Walk(model, ObservedOps(), flow, seed=5).run(looking)
    assert len(flow.batches) == 1
    assert looking.order == list(reversed(range(len(model.spec.layers))))
    whole = Whole(model, flow.batches[0].rows)
    torch.testing.assert_close(looking.states, whole.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(looking.gradient, whole.entry, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(looking.above, whole.top, rtol=1e-3, atol=1e-5)
    for index, expected in enumerate(whole.behind):
        torch.testing.assert_close(looking.behind_layers[index], expected, rtol=1e-3, atol=1e-5)
    assert len(looking.inner) == len(whole.passed)
    for (x, gradient), passed, expected in zip(
        looking.inner, whole.passed, whole.inner, strict=True
    ):
        torch.testing.assert_close(x, passed.input, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    given = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    rows = torch.stack([given, given.flip(0)]).repeat(20_000, 1)
    found = tokens(rows, torch.Generator().manual_seed(0)).view(-1, 2)
    for side, expected in enumerate((given, given.flip(0))):
        often = torch.bincount(found[:, side], minlength=6) / len(found)
        assert torch.equal(often == 0, expected == 0)
        torch.testing.assert_close(often, expected, rtol=0, atol=0.02)


def test_a_table_that_is_tied_is_judged_at_both_ends(tmp_path: Path) -> None:
    windows = calibration().windows
    for name, tied in (("llama-tied", True), ("llama", False)):
        model, ops = source(name), ObservedOps()
        looking, ends = Looking(), Ends(model.spec, "cpu")
        for visitor in (looking, ends):
            Walk(model, ops, Flow(model.spec, windows, tmp_path), seed=5).run(visitor)
        tokens = len(windows) * WINDOW
        expected = looking.gradient.T @ looking.gradient / tokens
        if tied:
            expected = expected + looking.states.T @ looking.states / tokens
        torch.testing.assert_close(ends.hessian, damped(expected, DAMPING), rtol=1e-4, atol=1e-6)


def test_gradients_too_large_to_be_squared_name_the_layer(tmp_path: Path) -> None:
    """Embeddings so small that a norm with hardly an epsilon makes their gradients huge."""
    config = {**CONFIGS["llama"], "rms_norm_eps": 1e-37}
    model = source_of(oracle(config), config)
    model.weights["embed.weight"].mul_(3e-19)
    flow = Flow(model.spec, calibration().windows, tmp_path)
    with pytest.raises(IntegrityError, match=r"layers\.0: gradients are NaN"):
        Walk(model, ObservedOps(), flow, seed=5).run(Looking())
