"""The reference ops, each as short as its definition.

The determinism contract is kept by shape instead of by hand-written loops: every matrix product
runs on tiles of exactly `ROW_TILE` rows, padded with zeros. One product therefore always has one
shape, whatever the batch, and a library that orders the sum over K by shape gives a row the same
bits everywhere. The price is wasted work at one row. With `exact_rows` off (training, whole-text
evaluation) products run whole.

Activations: "f32" as they are; "q8_0" rounds the input of every linear of a block scheme to int8
per 32 with an fp16 scale, as the native kernels do; "bf16" rounds both operands to bf16.

Weights stay packed; they are decoded once while the decoded total is within `decoded_bytes`, and at
every use beyond that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import (
    Experts,
    Graph,
    KVLayout,
    Linear,
    LowRank,
    Rows,
    Span,
    Step,
)
from halfbyte.kernels.reference.attention import ROW_TILE, attend_span
from halfbyte.kernels.reference.kv import KV, ReferenceKV, fake_q8
from halfbyte.kernels.reference.rope import rotate, rotation
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Activation, AttentionSpec, ExpertSpec

VECTOR = 32
Activations = Literal["f32", "q8_0", "bf16"]


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A stored tensor, and its decoded form if that is kept."""

    stored: QTensor
    dense: Tensor | None = None


class ReferenceOps:
    """See the contract for the meaning and shapes of each op."""

    name = "reference"
    schemes = tuple(SCHEMES.values())
    checks_finite = False

    def __init__(
        self,
        device: str = "cpu",
        *,
        activations: Activations = "f32",
        exact_rows: bool = True,
        decoded_bytes: int = 2**30,
    ) -> None:
        self.device = device
        self.activations = activations
        self.exact_rows = exact_rows
        self.packed_bytes = 0
        self._decoded_left = decoded_bytes
        self._spans: Sequence[Span] | None = None  # of the step that is running

    def pack(self, q: QTensor) -> Weight:
        size = 4 * int(np.prod(q.shape))
        self.packed_bytes += q.nbytes
        if size > self._decoded_left:
            return Weight(q)
        self._decoded_left -= size
        self.packed_bytes += size
        return Weight(q, decode(q, device=self.device))

    def is_finite(self, packed: Weight) -> bool:
        return bool(decode(packed.stored).isfinite().all())

    def unpack(self, packed: Weight) -> QTensor:
        return packed.stored

    def read_bandwidth(self) -> float | None:
        return None

    def new_kv(self, layout: KVLayout, key_norm: Weight | None = None) -> ReferenceKV:
        return ReferenceKV(layout, self.device, None if key_norm is None else self._dense(key_norm))

    def embed(self, rows: Rows, table: Weight, scale: float) -> Tensor:
        ids = np.asarray(rows.token_ids, dtype=np.int64)
        if table.dense is not None:
            return table.dense[torch.from_numpy(ids).to(self.device)] * scale
        return decode(table.stored.take_rows(ids), device=self.device) * scale

    def given(self, rows: Rows, width: int, start: int = 0) -> Tensor:
        states = torch.as_tensor(rows.states, dtype=torch.float32, device=self.device)
        return states[:, start : start + width]

    def concat(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=-1)

    def rms_norm(self, x: Tensor, weight: Weight | None, eps: float) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return normed if weight is None else normed * self._dense(weight)

    def linear(self, x: Tensor, linear: Linear) -> Tensor:
        weight: Weight = linear.weight
        y = self.product(x, weight)
        if linear.bias is not None:
            y = y + self._dense(linear.bias)
        return self._updated(y, x, linear.updates) if linear.updates else y

    def product(self, x: Tensor, weight: Weight, expert: int | None = None) -> Tensor:
        """`x @ weight.T`, or with one matrix of a stack of experts'.

        Every product of activations with a stored weight is one of these.
        """
        dense = self._dense(weight) if expert is None else self._slice(weight, expert)
        return self._product(self._rounded(x, weight), dense)

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_norm: Weight | None,
        k_norm: Weight | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
        kv: KV,
    ) -> Tensor:
        k_RGD, v_RGD = (part.unflatten(-1, (-1, attention.head_dim)) for part in (k, v))
        if k_norm is not None:
            k_RGD = self.rms_norm(k_RGD, k_norm, eps)
        if attention.value_norm:
            v_RGD = self.rms_norm(v_RGD, None, eps)
        cos, sin = rotation(self._positions(rows), attention.rope, attention.head_dim)
        kv.write(rows, rotate(k_RGD, cos, sin), v_RGD)
        return self.rope(q, q_norm=q_norm, attention=attention, eps=eps, rows=rows)

    def rope(
        self,
        q: Tensor,
        *,
        q_norm: Weight | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
    ) -> Tensor:
        q_RND = q.unflatten(-1, (-1, attention.head_dim))
        if q_norm is not None:
            q_RND = self.rms_norm(q_RND, q_norm, eps)
        positions = self._positions(rows) + attention.ahead
        cos, sin = rotation(positions, attention.rope, attention.head_dim)
        return rotate(q_RND, cos, sin).flatten(-2)

    def attend(self, q: Tensor, *, attention: AttentionSpec, rows: Rows, kv: KV) -> Tensor:
        q_RND = q.unflatten(-1, (-1, attention.head_dim))
        parts = q_RND.split([span.count for span in rows.spans])
        mixed = [
            attend_span(part, attention, span, kv, exact_rows=self.exact_rows)
            for part, span in zip(parts, rows.spans, strict=True)
        ]
        return torch.cat(mixed).flatten(-2)

    def residual(
        self,
        x: Tensor,
        update: Tensor,
        *,
        norm: Weight | None = None,
        eps: float = 0.0,
        scalar: Weight | None = None,
    ) -> Tensor:
        x = x + (update if norm is None else self.rms_norm(update, norm, eps))
        return x if scalar is None else x * self._dense(scalar)

    def gated_mlp(
        self, x: Tensor, *, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Tensor:
        gated = activated(self.linear(x, gate), activation)
        return self.linear(gated * self.linear(x, up), down)

    def route_experts(
        self,
        x: Tensor,
        scores: Tensor,
        *,
        experts: Experts,
        spec: ExpertSpec,
        activation: Activation,
    ) -> Tensor:
        probabilities = (scores * spec.score_scale).softmax(-1)
        chosen_RK = probabilities.sort(dim=-1, descending=True, stable=True).indices[:, : spec.used]
        weights_RE = torch.zeros_like(probabilities).scatter(
            -1, chosen_RK, probabilities.gather(-1, chosen_RK)
        )
        weights_RE = weights_RE / weights_RE.sum(-1, keepdim=True) * self._dense(experts.scale)
        mixed = torch.zeros_like(x)
        for index in chosen_RK.unique().tolist():
            rows = (chosen_RK == index).any(-1).nonzero()[:, 0]
            gate, up = self.product(x[rows], experts.gate_up, index).chunk(2, dim=-1)
            out = self.product(activated(gate, activation) * up, experts.down, index)
            mixed = mixed.index_add(0, rows, out * weights_RE[rows, index, None])
        return mixed

    def per_layer_inputs(
        self, tokens: Tensor, context: Tensor, *, norm: Weight, eps: float, scale: float
    ) -> Tensor:
        width = norm.stored.width
        normed = self.rms_norm((context * scale).unflatten(-1, (-1, width)), norm, eps)
        return (tokens + normed.flatten(-2)) * 0.5**0.5

    def per_layer_update(
        self,
        x: Tensor,
        inputs: Tensor,
        layer: int,
        *,
        gate: Linear,
        out: Linear,
        activation: Activation,
    ) -> Tensor:
        gated = activated(self.linear(x, gate), activation)
        width = gated.shape[-1]
        return self.linear(gated * inputs[:, layer * width : (layer + 1) * width], out)

    def select(self, x: Tensor, index: Sequence[int]) -> Tensor:
        return x[torch.tensor(list(index), dtype=torch.int64, device=x.device)]

    def logits(self, x: Tensor, head: Weight, softcap: float | None) -> Tensor:
        z = self.linear(x, Linear(weight=head))
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def clustered_logits(self, x: Tensor, scores: Tensor, head: Weight, used: int) -> Tensor:
        order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :used]
        chosen_RC = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
        z = self.linear(x, Linear(weight=head))
        chosen = chosen_RC.repeat_interleave(z.shape[-1] // scores.shape[-1], dim=-1)
        return z.masked_fill(~chosen, float("-inf"))

    def step(self, graph: Graph) -> Step:
        def run(rows: Rows, wanted: Sequence[int]) -> list[np.ndarray]:
            self._spans = rows.spans
            try:
                with torch.no_grad():
                    return [out.to("cpu", torch.float32).numpy() for out in graph(rows, wanted)]
            finally:
                self._spans = None

        return run

    def _updated(self, y: Tensor, x: Tensor, updates: Sequence[LowRank | None]) -> Tensor:
        """`y`, and on the rows of every adapter what it adds there."""
        for index, update in enumerate(updates):
            rows = self._rows_of(index).to(x.device)
            if update is not None and len(rows):
                inner = self._tiled(x[rows], self._dense(update.a))
                added = self._tiled(inner, self._dense(update.b)) * update.scale
                y = y.index_add(0, rows, added)
        return y

    def _rows_of(self, adapter: int) -> Tensor:
        """The rows of the running step whose sequences have this adapter."""
        assert self._spans is not None, "a linear with adapters outside of a step"
        counts = [span.count for span in self._spans]
        mine = torch.tensor([span.adapter == adapter for span in self._spans])
        return mine.repeat_interleave(torch.tensor(counts)).nonzero()[:, 0]

    def _dense(self, weight: Weight) -> Tensor:
        if weight.dense is not None:
            return weight.dense
        return decode(weight.stored, device=self.device)

    def _slice(self, weight: Weight, index: int) -> Tensor:
        """[rows, columns]: one of the matrices of a stored tensor [count, rows, columns]."""
        if weight.dense is not None:
            return weight.dense[index]
        rows = weight.stored.shape[1]
        stored = weight.stored.rows(index * rows, (index + 1) * rows)
        return decode(stored, device=self.device)

    def _rounded(self, x: Tensor, weight: Weight) -> Tensor:
        if self.activations == "bf16":
            return x.to(torch.bfloat16).to(torch.float32)
        if self.activations == "q8_0" and weight.stored.scheme.block > 1:
            return fake_q8(x)
        return x

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.activations == "bf16":
            weight = weight.to(torch.bfloat16).to(torch.float32)
        return self._tiled(x, weight)

    def _tiled(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self.exact_rows:
            return x @ weight.T
        padded = functional.pad(x, (0, 0, 0, -x.shape[0] % ROW_TILE))
        tiles = [tile @ weight.T for tile in padded.split(ROW_TILE)]
        return torch.cat(tiles)[: x.shape[0]]

    def _positions(self, rows: Rows) -> Tensor:
        spans = [torch.arange(span.start, span.start + span.count) for span in rows.spans]
        return torch.cat(spans).to(self.device)


def activated(x: Tensor, activation: Activation) -> Tensor:
    """The activation of every number; of whole vectors, since torch rounds what is left apart."""
    width = x.shape[-1]
    if width % VECTOR:
        x = functional.pad(x, (0, -width % VECTOR))
    y = functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")
    return y[..., :width]
