"""The reference ops with a window into them: what goes into a stored weight, while a layer runs.

A layer is run as it always is (`models/decoder.py`), and what is wanted of it, the inputs of one
weight, is taken where it passes. Nothing after that is computed; and what is known of a layer, the
inputs of its last product, is not computed again. Products run whole, in f32; sequences are whole
and start at 0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import Linear, Rows, Span
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import KV
from halfbyte.kernels.reference.ops import Weight
from halfbyte.specs import Activation, AttentionSpec

Run = Callable[[], object]
Observer = Callable[[Tensor, int | None], None]


@dataclass(frozen=True, slots=True)
class Passed:
    """One product: rows [R, K] times a stored weight, or one expert's matrix of it: [R, N]."""

    weight: Weight
    expert: int | None
    input: Tensor
    output: Tensor


class _Found(Exception):
    """The input that was looked for."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class ObservedOps(ReferenceOps):
    """Every weight that is packed is kept decoded, in f32."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device, exact_rows=False, decoded_bytes=sys.maxsize)
        self._weights: Sequence[Weight] = ()
        self._observer: Observer | None = None
        self._passed: list[Passed] | None = None
        self._known: tuple[Weight, Tensor] | None = None

    def gated_mlp(
        self, x: Tensor, *, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Tensor:
        if self._known is not None and self._known[0] is down.weight:
            return self.linear(self._known[1], down)
        return super().gated_mlp(x, gate=gate, up=up, down=down, activation=activation)

    def attend(self, q: Tensor, *, attention: AttentionSpec, rows: Rows, kv: KV) -> Tensor:
        q_RND = q.unflatten(-1, (-1, attention.head_dim))
        parts = q_RND.split([span.count for span in rows.spans])
        pairs = zip(parts, rows.spans, strict=True)
        return torch.cat([_mixed(q, attention, kv, span) for q, span in pairs]).flatten(-2)

    def product(self, x: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        if self._observer is not None and any(weight is wanted for wanted in self._weights):
            self._observer(x, expert)
        y = super().product(x, weight, expert)
        if self._passed is not None:
            self._passed.append(Passed(weight, expert, x, y))
        return y

    def input_of(self, weights: Sequence[Weight], run: Run) -> Tensor:
        """What `weights` are given [R, K] when `run` comes to the first; `run` goes no further."""

        def stop(x: Tensor, expert: int | None) -> None:
            raise _Found(x)

        with self._observing(weights, stop):
            try:
                run()
            except _Found as found:
                return found.x
        raise AssertionError("the weights take no part in what was run")

    def inputs_by_expert(self, weight: Weight, run: Run) -> dict[int, Tensor]:
        """What each expert of a stack is given [rows, K] in a whole `run`."""
        found: dict[int, Tensor] = {}

        def keep(x: Tensor, expert: int | None) -> None:
            assert expert is not None
            found[expert] = x

        with self._observing([weight], keep):
            run()
        return found

    def passed_in(self, run: Callable[[], Tensor]) -> tuple[Tensor, list[Passed]]:
        """What `run` gives, and all products in it, in order."""
        self._passed = passed = []
        try:
            return run(), passed
        finally:
            self._passed = None

    @contextmanager
    def knowing(self, weight: Weight, x: Tensor | None) -> Generator[None]:
        """Inside, an MLP that ends in `weight` is given its input [R, K], unless that is None."""
        self._known = None if x is None else (weight, x)
        try:
            yield
        finally:
            self._known = None

    @contextmanager
    def _observing(self, weights: Sequence[Weight], observer: Observer) -> Generator[None]:
        self._weights, self._observer = weights, observer
        try:
            yield
        finally:
            self._weights, self._observer = (), None


def _mixed(q_TND: Tensor, attention: AttentionSpec, kv: KV, span: Span) -> Tensor:
    """A whole sequence's attention [T, N, D], in PyTorch's own way: four times as fast as its
    definition, and as exact as calibration needs."""
    count, window = span.count, attention.window or span.count
    group = attention.heads // attention.kv_heads
    keys, values = (part.repeat_interleave(group, dim=1) for part in kv.read(span, 0, count))
    seen = None
    if window < count:
        seen = torch.ones(count, count, dtype=torch.bool, device=q_TND.device)
        seen = seen.tril().triu(1 - window)
    mixed_1NTD = functional.scaled_dot_product_attention(
        *(part.transpose(0, 1)[None] for part in (q_TND, keys, values)),
        attn_mask=seen,
        is_causal=seen is None,
        scale=attention.scale,
    )
    return mixed_1NTD[0].transpose(0, 1)
