"""The one decoder: a model's forward pass, written once against the op set.

It reads the spec and speaks ops; it does no arithmetic of its own and knows no architecture by
name. What it is given are chunks: consecutive new tokens of several sequences, of any lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.kernels.contract import (
    Array,
    Choice,
    Choosing,
    Draw,
    Experts,
    Graph,
    Linear,
    OpSet,
    Rows,
    Step,
)
from halfbyte.kernels.relay import Relay
from halfbyte.models.cache import Cache, CacheShape, Slot
from halfbyte.specs import LayerSpec, ModelSpec, Part, divided_name

Wanted = Literal["all", "last", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """New tokens of one sequence, and which of their rows are wanted.

    A sequence keeps to one `adapter` (a name, None for the model as it is): its keys are of it.
    """

    slot: Slot
    token_ids: Sequence[int]
    wanted: Wanted = "last"
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureWeights:
    """What a layer with experts has beside its MLP."""

    mlp_own_norm: Array
    router_scale: Array
    router: Linear
    experts_norm: Array
    experts: Experts
    experts_own_norm: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class GateWeights:
    """How the embeddings per layer come into a layer."""

    gate: Linear
    out: Linear
    norm: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerWeights:
    """Where the embeddings per layer come from."""

    embed: Array
    project: Linear
    norm: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """The packed weights of one layer; None where the spec has no such tensor."""

    attn_norm: Array
    q: Linear
    k: Linear | None
    v: Linear | None
    q_norm: Array | None
    k_norm: Array | None
    o: Linear
    attn_post_norm: Array | None
    mlp_norm: Array
    gate: Linear
    up: Linear
    down: Linear
    mixture: MixtureWeights | None
    mlp_post_norm: Array | None
    per_layer: GateWeights | None
    scalar: Array | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The packed weights of a model, or of a run of its layers: what lies elsewhere is None.

    A tied head is the embedding itself.
    """

    embed: Array
    per_layer: PerLayerWeights | None
    layers: Sequence[LayerWeights]
    norm: Array
    head: Array


class Decoder:
    """A model that runs: its spec, its weights, and the op set they are packed for.

    `adapters` are the names of the updates of its linears, in their order; they take
    `adapter_bytes` of what the op set has packed. `part` is what it has of the
    model, None for all. What is before that is run by `front`, on another op set: the two are one
    model, and this one goes on from the states that the front hands over.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        ops: OpSet,
        *,
        adapters: Sequence[str] = (),
        adapter_bytes: int = 0,
        part: Part | None = None,
        front: Decoder | None = None,
    ) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = ops
        self.adapters = tuple(adapters)
        self.part = spec.whole if part is None else part
        self.front = front
        self._adapter_bytes = adapter_bytes

    @property
    def name(self) -> str:
        """The op set that runs it; where there are two, which has how many layers."""
        if self.front is None:
            return self.ops.name
        return divided_name(self.ops.name, self.front.ops.name, len(self.front.part.layers))

    @property
    def packed_bytes(self) -> int:
        """What all that was packed takes, wherever it lies."""
        return self.ops.packed_bytes + (0 if self.front is None else self.front.packed_bytes)

    @property
    def adapter_bytes(self) -> int:
        """What the adapters take of that."""
        return self._adapter_bytes + (0 if self.front is None else self.front.adapter_bytes)

    def new_cache(
        self, shape: CacheShape, graph: Callable[[Sequence[Array]], Graph] | None = None
    ) -> Cache:
        """A cache of this shape; its step gives logits and states, unless it is another `graph`.

        That of a part in front gives the states that it hands over.
        """
        cells = self._new_cells(shape)
        step = self._step(cells, graph)
        if self.front is not None:
            step = Relay(self.front._step(cells), step)
        return Cache(self.spec, shape, cells, step)

    def _new_cells(self, shape: CacheShape) -> list[Array | None]:
        """The cells of every layer up to the last of these; None where others have them."""
        lacking: list[Array | None] = [None] * self.part.layers.start
        cells = lacking if self.front is None else self.front._new_cells(shape)
        for index, weights in enumerate(self.weights.layers, self.part.layers.start):
            layer = self.spec.layers[index]
            source = layer.kv_source
            own = source is None
            cells.append(
                self.ops.new_kv(shape.layout(layer), weights.k_norm) if own else cells[source]
            )
        return cells

    def _step(
        self, cells: Sequence[Array], graph: Callable[[Sequence[Array]], Graph] | None = None
    ) -> Step:
        own = self._graph if self.part.ends else self._handing
        return self.ops.step((graph or own)(cells))

    def forward(self, chunks: Sequence[Chunk], cache: Cache) -> np.ndarray:
        """Logits [wanted rows, V] f32 of the chunks, in order; their slots move forward."""
        return self.outputs(chunks, cache)[0]

    def outputs(self, chunks: Sequence[Chunk], cache: Cache) -> Sequence[np.ndarray]:
        """The logits [wanted rows, V] of `forward`, and the states [wanted rows, H] they are of."""
        return cache.step(self._rows(chunks, cache), _wanted_rows(chunks))

    def choose(
        self, chunks: Sequence[Chunk], cache: Cache, draws: Sequence[Draw], *, states: bool
    ) -> Choice | None:
        """The tokens of the wanted rows of `outputs`, chosen on the device, and their states.

        None, and nothing computed, where the op set does not choose or not so.
        """
        step = cache.step
        if not isinstance(step, Choosing) or not step.able(draws):
            return None
        return step.choose(self._rows(chunks, cache), _wanted_rows(chunks), draws, states=states)

    def _graph(self, caches: Sequence[Array]) -> Graph:
        def graph(rows: Rows, wanted: Sequence[int]) -> tuple[Array, Array]:
            states = self.states(rows, caches, wanted)
            return self.logits(states), states

        return graph

    def _handing(self, caches: Sequence[Array]) -> Graph:
        """[R, H] the states behind these layers, and with them the embeddings per layer."""

        def graph(rows: Rows, wanted: Sequence[int]) -> tuple[Array]:
            x, inputs = self._through(rows, caches)
            return (x if inputs is None else self.ops.concat(x, inputs),)

        return graph

    def states(
        self, rows: Rows, caches: Sequence[Array], wanted: Sequence[int] | None = None
    ) -> Array:
        """The normed final states [R, H] that the head is applied to; all rows unless `wanted`."""
        x, _ = self._through(rows, caches)
        return self.leave(x if wanted is None else self.ops.select(x, wanted))

    def _through(self, rows: Rows, caches: Sequence[Array]) -> tuple[Array, Array | None]:
        """The states [R, H] behind these layers, and the embeddings per layer that came along."""
        x, inputs = self.enter(rows)
        for index, weights in enumerate(self.weights.layers, self.part.layers.start):
            x = self.attention(x, index, weights, rows, caches[index])
            x = self.feed_forward(x, index, weights, inputs)
        return x, inputs

    def enter(self, rows: Rows) -> tuple[Array, Array | None]:
        """What the layers start from: the embeddings [R, H], and those per layer if there are; or
        what the layers before these have handed over."""
        if not self.part.begins:
            return self._handed(rows)
        x = self.ops.embed(rows, self.weights.embed, self.spec.embed_scale)
        return x, self._per_layer_inputs(x, rows)

    def _handed(self, rows: Rows) -> tuple[Array, Array | None]:
        hidden, each = self.spec.hidden, self.spec.per_layer
        x = self.ops.given(rows, hidden)
        if each is None:
            return x, None
        return x, self.ops.given(rows, len(self.spec.layers) * each.width, hidden)

    def attention(
        self, x: Array, index: int, weights: LayerWeights, rows: Rows, kv: Array
    ) -> Array:
        """The first half of layer `index`: [R, H] after attention and its residual."""
        return self.attended(x, self.mixed(x, index, weights, rows, kv), weights)

    def mixed(self, x: Array, index: int, weights: LayerWeights, rows: Rows, kv: Array) -> Array:
        """What attention mixes of all positions: the heads' outputs [R, N * D]."""
        ops, layer, eps = self.ops, self.spec.layers[index], self.spec.norm_eps
        q = self._queries(ops.rms_norm(x, weights.attn_norm, eps), layer, weights, rows, kv)
        return ops.attend(q, attention=layer.attention, rows=rows, kv=kv)

    def attended(self, x: Array, mixed: Array, weights: LayerWeights) -> Array:
        """[R, H]: what was mixed, added to the states that it was made of."""
        ops, norm = self.ops, weights.attn_post_norm
        return ops.residual(x, ops.linear(mixed, weights.o), norm=norm, eps=self.spec.norm_eps)

    def feed_forward(
        self, x: Array, index: int, weights: LayerWeights, inputs: Array | None
    ) -> Array:
        """The second half of layer `index`: [R, H] as the layer ends."""
        ops, layer, eps = self.ops, self.spec.layers[index], self.spec.norm_eps
        activation = layer.mlp.activation
        gated = ops.gated_mlp(
            ops.rms_norm(x, weights.mlp_norm, eps),
            gate=weights.gate,
            up=weights.up,
            down=weights.down,
            activation=activation,
        )
        if weights.mixture is not None:
            gated = self._with_experts(gated, x, layer, weights.mixture)
        entry = weights.per_layer
        if entry is None:
            norm, scalar = weights.mlp_post_norm, weights.scalar
            return ops.residual(x, gated, norm=norm, eps=eps, scalar=scalar)
        x = ops.residual(x, gated, norm=weights.mlp_post_norm, eps=eps)
        update = ops.per_layer_update(
            x, inputs, index, gate=entry.gate, out=entry.out, activation=activation
        )
        return ops.residual(x, update, norm=entry.norm, eps=eps, scalar=weights.scalar)

    def leave(self, x: Array) -> Array:
        """The final norm."""
        return self.ops.rms_norm(x, self.weights.norm, self.spec.norm_eps)

    def logits(self, hidden: Array) -> Array:
        """Logits [R, V] of final states."""
        return self.ops.logits(hidden, self.weights.head, self.spec.logit_softcap)

    def _rows(self, chunks: Sequence[Chunk], cache: Cache) -> Rows:
        for chunk in chunks:
            self._check_ids(chunk.token_ids)
            cache.check(chunk.slot, len(chunk.token_ids))
        token_ids = [token for chunk in chunks for token in chunk.token_ids]
        spans = [
            chunk.slot.advance(
                len(chunk.token_ids),
                None if chunk.adapter is None else self.adapters.index(chunk.adapter),
            )
            for chunk in chunks
        ]
        return Rows(token_ids=token_ids, spans=spans)

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        low, high = min(token_ids, default=0), max(token_ids, default=0)
        if low < 0 or high >= self.spec.vocab:
            raise InvalidInputError(
                f"token ids must be in [0, {self.spec.vocab}); got {low} to {high}",
                hint="the tokenizer does not belong to this model",
            )

    def _per_layer_inputs(self, x: Array, rows: Rows) -> Array | None:
        spec, weights = self.spec.per_layer, self.weights.per_layer
        if spec is None or weights is None:
            return None
        return self.ops.per_layer_inputs(
            self.ops.embed(rows, weights.embed, spec.token_scale),
            self.ops.linear(x, weights.project),
            norm=weights.norm,
            eps=self.spec.norm_eps,
            scale=spec.context_scale,
        )

    def _queries(
        self, x: Array, layer: LayerSpec, weights: LayerWeights, rows: Rows, kv: Array
    ) -> Array:
        """The rotated queries; keys and values, where the layer has its own, go to the cache."""
        ops, attention, eps = self.ops, layer.attention, self.spec.norm_eps
        q_norm = weights.q_norm
        if weights.k is None:
            q = ops.linear(x, weights.q)
            return ops.rope(q, q_norm=q_norm, attention=attention, eps=eps, rows=rows)
        k = ops.linear(x, weights.k)
        return ops.rope_and_store(
            ops.linear(x, weights.q),
            k,
            k if weights.v is None else ops.linear(x, weights.v),
            q_norm=q_norm,
            k_norm=weights.k_norm,
            attention=attention,
            eps=eps,
            rows=rows,
            kv=kv,
        )

    def _with_experts(
        self, gated: Array, x: Array, layer: LayerSpec, weights: MixtureWeights
    ) -> Array:
        """The MLP's output and the experts', each normed, added up."""
        assert layer.experts is not None
        ops, eps = self.ops, self.spec.norm_eps
        mixed = ops.route_experts(
            ops.rms_norm(x, weights.experts_norm, eps),
            ops.linear(ops.rms_norm(x, weights.router_scale, eps), weights.router),
            experts=weights.experts,
            spec=layer.experts,
            activation=layer.mlp.activation,
        )
        own = ops.rms_norm(gated, weights.mlp_own_norm, eps)
        return ops.residual(own, mixed, norm=weights.experts_own_norm, eps=eps)


def _wanted_rows(chunks: Sequence[Chunk]) -> list[int]:
    index: list[int] = []
    start = 0
    for chunk in chunks:
        end = start + len(chunk.token_ids)
        first = {"all": start, "last": end - 1, "none": end}[chunk.wanted]
        index.extend(range(first, end))
        start = end
    return index
