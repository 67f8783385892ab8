"""One layer while it is being quantized: its tensors as they are now, run over the windows.

A layer has two halves, attention and feed-forward, and in each a few groups of weights with one
input: q, k and v; o; gate and up; down. They are quantized group by group in the order of the
forward pass, so that each sees what those before it now give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from halfbyte.errors import IntegrityError
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import layer_weights
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.flow import Batch, Flow
from halfbyte.quantizer.moment import SecondMoment, drawn_together
from halfbyte.quantizer.observed import ObservedOps

Half = Literal["attention", "feed_forward"]
HALVES: tuple[Half, ...] = ("attention", "feed_forward")
# What an expert that saw few tokens borrows from all of them, in tokens.
BORROWED = 32.0


@dataclass(frozen=True, slots=True)
class Group:
    """Weights of one half that have one input; a stack of experts' is `routed`."""

    half: Half
    parts: Sequence[str]
    routed: bool = False


ATTENTION_IN = Group("attention", ("attn.q", "attn.k", "attn.v"))
OUT = Group("attention", ("attn.o",))
FEED_FORWARD_IN = Group("feed_forward", ("mlp.gate", "mlp.up"))
DOWN = Group("feed_forward", ("mlp.down",))
GROUPS = (
    ATTENTION_IN,
    OUT,
    FEED_FORWARD_IN,
    DOWN,
    Group("feed_forward", ("experts.gate_up",), routed=True),
    Group("feed_forward", ("experts.down",), routed=True),
    Group("feed_forward", ("per_layer.gate",)),
    Group("feed_forward", ("per_layer.out",)),
)


class Block:
    """Layer `index` of `decoder`, which needs no layers of its own. `tensors` by our names."""

    def __init__(self, decoder: Decoder, ops: ObservedOps, index: int) -> None:
        self.index = index
        self.name = f"layers.{index}"
        self.tensors: dict[str, Weight] = {}
        self._decoder, self._ops = decoder, ops

    def put(self, name: str, q: QTensor) -> None:
        """A tensor, or what takes its place."""
        self.tensors[name] = self._ops.pack(q)

    @property
    def dense(self) -> Mapping[str, Tensor]:
        """The tensors in f32, on the device."""
        return {name: w.dense for name, w in self.tensors.items() if w.dense is not None}

    def members(self, group: Group) -> list[str]:
        """The names of a group's weights in this layer; none where it has no such group."""
        names = [f"{self.name}.{part}.weight" for part in group.parts]
        return [name for name in names if name in self.tensors]

    def run(self, half: Half, batch: Batch) -> Tensor:
        """A half of the layer over the states of a batch: the states after it [R, H]."""
        decoder, spec = self._decoder, self._decoder.spec
        weights = layer_weights(self.tensors, spec, self.index)
        x = batch.x.to(self._ops.device)
        if half == "attention":
            mixed = self._known(OUT, batch)
            if mixed is None:
                keys = batch.keys_of(spec, self.index)
                mixed = decoder.mixed(x, self.index, weights, batch.rows, keys)
            return decoder.attended(x, mixed, weights)
        inputs = None if batch.inputs is None else batch.inputs.to(self._ops.device)
        with self._ops.knowing(weights.down.weight, self._known(DOWN, batch)):
            return decoder.feed_forward(x, self.index, weights, inputs)

    def advance(self, half: Half, flow: Flow) -> None:
        """The states of all windows become those after a half of the layer.

        Raises `IntegrityError` where they are no longer numbers.
        """
        for batch in flow.batches:
            batch.x.copy_(self.run(half, batch))
            batch.known.clear()
            if not bool(batch.x.isfinite().all()):
                raise IntegrityError(
                    f"activations are NaN or infinite after its {half.replace('_', '-')}",
                    where=self.name,
                    hint="the checkpoint is damaged, or its activations are beyond f32",
                )

    def hessians(self, group: Group, flow: Flow, *, final: bool = True) -> Tensor:
        """The mean of x x^T over the inputs of a group: [1, K, K], or [E, K, K] of experts.

        `final`: what makes the inputs will not change any more, so `run` need not make them again.
        """
        stored = self.tensors[self.members(group)[0]].stored
        count = stored.shape[0] if group.routed else 1
        moments = [SecondMoment(stored.width, self._ops.device) for _ in range(count)]
        for batch in flow.batches:
            for expert, x in self._inputs(group, batch):
                moments[expert].add(x)
                if final and group in (OUT, DOWN):
                    batch.known[self._name(group)] = flow.allocate(x.shape).copy_(x)
        return drawn_together(moments, BORROWED) if group.routed else moments[0].mean[None]

    def _known(self, group: Group, batch: Batch) -> Tensor | None:
        """The input of the one weight of a group, where it need not be made again."""
        x = batch.known.get(self._name(group))
        return None if x is None else x.to(self._ops.device)

    def _name(self, group: Group) -> str:
        return f"{self.name}.{group.parts[0]}"

    def _inputs(self, group: Group, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        weights = [self.tensors[name] for name in self.members(group)]

        def run() -> Tensor:
            return self.run(group.half, batch)

        if group.routed:
            yield from self._ops.inputs_by_expert(weights[0], run).items()
        else:
            yield 0, self._ops.input_of(weights, run)
