"""How the divergence of a model's predictions follows from changes inside it: Fisher's gradients.

For a small change of a model, KL(before || after) at a token is half the square of the change along
g, averaged over g = the gradient of log p(y) with y drawn from the model itself. So one walk back
from drawn tokens says what any change of any activation costs, to second order, without ever making
it. The walk goes a layer at a time: the states before every layer are kept on the way forward, and
on the way back a layer is run once more with gradients. Memory on the device: one layer, twice the
activations of a batch, and the head.

What it is not: exact for large changes; and where layers share the keys of another, what passes
through these alone is not followed back to it.
Sources: Martens, "New insights and perspectives on the natural gradient method" (arXiv 1412.1193);
for quantization, YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.decoder import Decoder
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.block import HALVES, Block
from halfbyte.quantizer.flow import Batch, Flow
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import outer

LOGITS = 1 << 24  # logits that exist at once: 64 MiB of f32, and a few times that with gradients

Visit = Callable[[int, Batch], None]
"""Called with a layer's index and a batch whose gradients are there, from the last layer down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Second moments [H, H] at the two ends of a model, means over the tokens.

    `final`: of the final states, normed. `entry`: of the gradients at the embeddings, unscaled.
    For a row e of an error of the table with probability p of its token, the divergence is about
    p / 2 times e^T entry e where the table takes tokens in, e^T final e where it is the head.
    """

    final: Tensor
    entry: Tensor


class Walk:
    """One walk through a source and back, over the windows of a flow (which it uses up)."""

    def __init__(self, source: Source, ops: ObservedOps, flow: Flow, *, seed: int) -> None:
        self._source, self._ops, self._flow = source, ops, flow
        self._decoder = outer(source, ops)
        self._chance = torch.Generator(ops.device).manual_seed(seed)
        self._before: list[list[Tensor]] = []  # the states before each layer, by batch

    def run(self, visit: Visit | None = None) -> Ends:
        """Forward, and back. `visit` sees every layer after its batch went back through it."""
        with torch.no_grad():
            self._forward()
        with torch.enable_grad():
            return self._backward(*self._top(), visit)

    def _backward(self, final: Tensor, gradients: list[Tensor], visit: Visit | None) -> Ends:
        for index in reversed(range(len(self._before))):
            block = self._block(index)
            for number, batch in enumerate(self._flow.batches):
                batch.x = self._before[index][number]
                gradients[number] = self._back(block, batch, gradients[number])
                if visit is not None:
                    visit(index, batch)
        return Ends(final=final, entry=self._moment(gradients) * self._source.spec.embed_scale**2)

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
            if tensor.name.startswith(f"layers.{index}."):
                block.put(tensor.name, self._source.tensor(tensor.name))
        return block

    def _top(self) -> tuple[Tensor, list[Tensor]]:
        """The second moment of the final states, and the gradients at the states before."""
        stored = self._decoder.weights.head.stored
        head = Weight(stored, decode(stored, device=self._ops.device))
        decoder = Decoder(self._source.spec, replace(self._decoder.weights, head=head), self._ops)
        with torch.no_grad():
            states = (decoder.leave(x) for batch in self._flow.batches for x in self._pieces(batch))
            final = self._moment(states)
        gradients = [
            torch.cat([self._drawn(decoder, x) for x in self._pieces(batch)])
            for batch in self._flow.batches
        ]
        return final, gradients

    def _moment(self, batches: Iterable[Tensor]) -> Tensor:
        return SecondMoment.of(batches, self._source.spec.hidden, self._ops.device).mean

    def _pieces(self, batch: Batch) -> Iterator[Tensor]:
        """The states of a batch on the device, as many at once as have room for their logits."""
        for x in batch.x.split(max(1, LOGITS // self._source.spec.vocab)):
            yield x.to(self._ops.device)

    def _drawn(self, decoder: Decoder, x: Tensor) -> Tensor:
        """The gradient at states [R, H] of log p of a token drawn for each."""
        x = x.detach().requires_grad_()
        log_p = decoder.logits(decoder.leave(x)).log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=self._chance)
        return torch.autograd.grad(log_p.gather(1, drawn).sum(), x)[0].cpu()

    def _back(self, block: Block, batch: Batch, gradient: Tensor) -> Tensor:
        """The gradient before a layer, from that after it."""
        batch.x = start = batch.x.to(self._ops.device).detach().requires_grad_()
        for half in HALVES:
            batch.x = block.run(half, batch)
        return torch.autograd.grad(batch.x, start, gradient.to(self._ops.device))[0].cpu()
