"""How a model's predictions hang on what happens inside it: Fisher's gradients.

For a small change d of some activation, KL(before || after) at a token is half of (g . d)^2,
averaged over g = the gradient of log p(y) with y drawn from the model's own prediction. So one walk
back from drawn tokens tells what any change costs, to second order, without ever making it. The
walk goes a layer at a time: the states before every layer are kept on the way forward, and on the
way back a layer runs once more, with gradients. Memory on the device: one layer, a few times the
activations of a batch, and the head.

What it is not: exact for large changes. Where a layer reads the keys of another, what passes
through them is not followed back to that one.
Source: Martens, "New insights and perspectives on the natural gradient method" (arXiv 1412.1193).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.contract import Rows
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.decoder import Decoder
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.block import HALVES, Block
from halfbyte.quantizer.flow import Batch, Flow
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.outer import outer

LOGITS = 1 << 20  # that exist at once: 4 MiB, which a cache holds, a few times with gradients
ROWS = 64  # of them at least


class Visitor(Protocol):
    """Who looks on during a walk. Rows are tokens; everything is f32, on the device.

    What is shown must be copied to be kept: its place is used again.
    """

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        """Final states [R, H], normed, what the model predicts of them [R, V], and the gradient
        at them."""
        ...

    def behind(self, block: Block, gradient: Tensor) -> None:
        """The gradient [R, H] at the states that a layer makes of a batch."""
        ...

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        """The products of a layer with a batch, and the gradient at the output of each."""
        ...

    def left(self, block: Block) -> None:
        """A layer has shown all batches."""
        ...

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        """The gradient [R, H] at the embeddings of a batch."""
        ...


class Walk:
    """One walk through a source and back, over the windows of a flow (which it uses up).

    States and gradients are where those of the flow are."""

    def __init__(self, source: Source, ops: ObservedOps, flow: Flow, *, seed: int) -> None:
        self._source, self._ops, self._flow = source, ops, flow
        self._decoder = outer(source, ops)
        self._chance = torch.Generator(ops.device).manual_seed(seed)
        self._before: list[list[Tensor]] = []  # the states before each layer, by batch

    def run(self, visitor: Visitor) -> None:
        """Forward, and back from the last layer to the first.

        Raises `IntegrityError` where states or gradients are no longer numbers.
        """
        with torch.no_grad():
            self._forward()
        gradients = self._top(visitor)
        for index in reversed(range(len(self._before))):
            block = self._block(index)
            for number, batch in enumerate(self._flow.batches):
                batch.x = self._before[index][number]
                gradients[number].copy_(self._back(block, batch, gradients[number], visitor))
                _check(block, gradients[number])
            visitor.left(block)
        for batch, gradient in zip(self._flow.batches, gradients, strict=True):
            visitor.entered(batch.rows, gradient.to(self._ops.device))

    def _forward(self) -> None:
        flow = self._flow
        flow.enter(self._decoder)
        for index in range(len(self._source.spec.layers)):
            self._before.append([flow.allocate(b.x.shape).copy_(b.x) for b in flow.batches])
            block = self._block(index)
            for half in HALVES:
                block.advance(half, flow)

    def _block(self, index: int) -> Block:
        block = Block(self._decoder, self._ops, index)
        for tensor in self._source.spec.tensors():
            if tensor.name.startswith(f"{block.name}."):
                block.put(tensor.name, self._source.tensor(tensor.name))
        return block

    def _top(self, visitor: Visitor) -> list[Tensor]:
        """The gradients at the states that the last layer gives, by batch."""
        stored = self._decoder.weights.head.stored
        head = Weight(stored, decode(stored, device=self._ops.device))
        decoder = Decoder(self._source.spec, replace(self._decoder.weights, head=head), self._ops)
        found = [self._flow.allocate(batch.x.shape) for batch in self._flow.batches]
        for batch, gradients in zip(self._flow.batches, found, strict=True):
            pieces = [self._drawn(decoder, x, visitor) for x in self._pieces(batch)]
            torch.cat(pieces, out=gradients)
        return found

    def _pieces(self, batch: Batch) -> Iterator[Tensor]:
        """The states of a batch, as many at once as have room for their logits."""
        for x in batch.x.split(max(ROWS, LOGITS // self._source.spec.vocab)):
            yield x.to(self._ops.device).requires_grad_()

    def _drawn(self, decoder: Decoder, x: Tensor, visitor: Visitor) -> Tensor:
        """The gradient at states [R, H] of log p of a token drawn for each."""
        with torch.enable_grad():
            states = decoder.leave(x)
            logits = decoder.logits(states)
        probabilities = logits.detach().softmax(-1)
        drawn = tokens(probabilities, self._chance)
        at_logits = probabilities.neg().scatter_add_(1, drawn, torch.ones_like(x[:, :1]))
        at_x, at_states = torch.autograd.grad(logits, [x, states], at_logits)
        visitor.top(states.detach(), probabilities, at_states)
        return at_x.cpu()

    def _back(self, block: Block, batch: Batch, gradient: Tensor, visitor: Visitor) -> Tensor:
        """The gradient before a layer, from that after it."""
        start = batch.x.to(self._ops.device).requires_grad_()

        def run() -> Tensor:
            batch.x = start
            for half in HALVES:
                batch.x = block.run(half, batch)
            return batch.x

        with torch.enable_grad():
            end, passed = self._ops.passed_in(run)
        inner = [product.output for product in passed]
        gradient = gradient.to(self._ops.device)
        found = torch.autograd.grad(end, [start, *inner], gradient)
        with torch.no_grad():
            visitor.behind(block, gradient)
            visitor.layer(block, passed, found[1:])
        return found[0].cpu()


def tokens(probabilities: Tensor, chance: torch.Generator) -> Tensor:
    """One drawn for every row of probabilities [R, V]: [R, 1].

    By where a random number falls among their sums: `torch.multinomial` asks for V random numbers.
    """
    sums = probabilities.cumsum(-1)
    where = torch.rand(len(sums), 1, generator=chance, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, where, right=True).clamp_(max=sums.shape[-1] - 1)


def _check(block: Block, gradient: Tensor) -> None:
    if not bool(gradient.square().sum().isfinite()):
        raise IntegrityError(
            "gradients are NaN, infinite, or too large to be squared before it",
            where=block.name,
            hint="the checkpoint is damaged, or its activations are beyond f32",
        )
