"""The model that is trained: the decoder over weights on their grid, run over whole windows.

Norms and other vectors ship as they are and are trained, too. Tables and matrices that are no part
of the training stay as they are stored. With `again`, a layer keeps nothing but its input for the
way back and is computed a second time there, its rounding included, so that one layer's weights
exist in f32 at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.decoder import Decoder, Weights
from halfbyte.models.load import NO_UPDATES, Updates, layer_weights, per_layer_weights
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec
from halfbyte.training.grid import OnGrid
from halfbyte.training.heads import StoredHead
from halfbyte.training.ops import TrainingOps

VALUE = "value"
TABLES = ("embed.weight", "per_layer.embed.weight", "head.weight")


class Vector:
    """A norm, a bias or a scalar: it is stored as it is, in f32."""

    def __init__(self, q: QTensor, device: str) -> None:
        self._value = decode(q, device=device).requires_grad_()
        self._size = max(float(self._value.detach().abs().mean()), 1e-3)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {VALUE: self._value}

    @property
    def rates(self) -> Mapping[str, float]:
        return {VALUE: self._size}

    def weight(self) -> Tensor:
        return self._value

    def stored(self) -> QTensor:
        return encode(self._value.detach(), SCHEMES["f32"])


class Tensors:
    """The tensors of a model, or of some of its layers: trained ones, and the others as stored.

    `updates` are what adapters that are trained add to linears, by the names of weights."""

    def __init__(self, stored: Mapping[str, QTensor], trained: Mapping[str, OnGrid]) -> None:
        self._stored, self.trained = stored, trained
        self.updates: Updates = NO_UPDATES

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{name}.{part}": leaf
            for name, tensor in self.trained.items()
            for part, leaf in tensor.parameters.items()
        }

    @property
    def rates(self) -> dict[str, float]:
        return {
            f"{name}.{part}": rate
            for name, tensor in self.trained.items()
            for part, rate in tensor.rates.items()
        }

    def clear_gradients(self) -> None:
        """They are zero, and there from now on: passes add to them in place."""
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def weights(self, prefix: str, device: str) -> dict[str, Weight]:
        """The weights whose names begin so, dense; trained ones with their gradients."""
        return {
            name: Weight(q, self._dense(name, q, device))
            for name, q in self._stored.items()
            if name.startswith(prefix)
        }

    def weight(self, name: str, device: str) -> Weight:
        q = self._stored[name]
        return Weight(q, self._dense(name, q, device))

    def stored(self, name: str) -> QTensor:
        """A tensor as it was given."""
        return self._stored[name]

    def results(self) -> Iterator[tuple[str, QTensor]]:
        """Every tensor as it is stored now."""
        for name, q in self._stored.items():
            yield name, self.trained[name].stored() if name in self.trained else q

    def _dense(self, name: str, q: QTensor, device: str) -> Tensor | None:
        if name in self.trained:
            return self.trained[name].weight()
        return None if name in TABLES else decode(q, device=device)


def load_checkpointing() -> None:
    """Loads what torch's `checkpoint` does at its first call: some 80 MB of modules, which are no
    part of what a training takes."""
    import_module("torch._dynamo")


def rows_of(windows: Sequence[Sequence[int]]) -> Rows:
    """Windows of one length as the rows of one forward."""
    spans = [Span(start=0, count=len(window), pages=(), ring=0) for window in windows]
    return Rows(token_ids=[token for window in windows for token in window], spans=spans)


class Student:
    """A model over `tensors`, which are all of its."""

    def __init__(self, spec: ModelSpec, tensors: Tensors, ops: TrainingOps, *, again: bool) -> None:
        self.spec, self.tensors, self.ops, self._again = spec, tensors, ops, again
        trained = spec.head_name in tensors.trained
        self._head = None if trained else StoredHead(tensors.stored(spec.head_name), ops.device)

    def states(self, windows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | StoredHead]:
        """The normed final states [R, H] of windows of one length, and the head [V, H]."""
        rows, device = rows_of(windows), self.ops.device
        outside = {
            name: self.tensors.weight(name, device)
            for name in (tensor.name for tensor in self.spec.tensors())
            if not name.startswith("layers.")
        }
        head = outside[self.spec.head_name]
        decoder = Decoder(
            self.spec,
            Weights(
                embed=outside["embed.weight"],
                per_layer=per_layer_weights(outside, self.tensors.updates)
                if self.spec.per_layer
                else None,
                layers=(),
                norm=outside["norm.weight"],
                head=head,
            ),
            self.ops,
        )
        x, inputs = decoder.enter(rows)
        keys = [ScratchKV() for _ in self.spec.layers]
        for index in range(len(self.spec.layers)):
            x = self._layer(decoder, x, inputs, rows, keys, index)
        if self._head is not None:
            return decoder.leave(x), self._head
        assert head.dense is not None
        return decoder.leave(x), head.dense

    def _layer(
        self,
        decoder: Decoder,
        x: Tensor,
        inputs: Tensor | None,
        rows: Rows,
        keys: list[ScratchKV],
        index: int,
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            packed = self.tensors.weights(f"layers.{index}.", self.ops.device)
            weights = layer_weights(packed, self.spec, index, self.tensors.updates)
            source = self.spec.layers[index].kv_source
            x = decoder.attention(
                x, index, weights, rows, keys[index if source is None else source]
            )
            return decoder.feed_forward(x, index, weights, inputs)

        if not (self._again and torch.is_grad_enabled()):
            return run(x)
        result: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore
        return result
