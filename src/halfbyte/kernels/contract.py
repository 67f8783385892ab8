"""The contract of an op set: which ops there are, their shapes, and what they guarantee.

One decoder is written against these ops and does no arithmetic of its own; an op set may run them
at once (reference) or record them into a program that is replayed (native). Arrays are the op
set's own and opaque to the decoder. What a row of activations *is* (f32, bf16, int8 inside a
linear) is the op set's affair; its accuracy against the reference is stated by each op set.

Shapes: R rows of the batch, H hidden, N query heads, G key/value heads, D head dim, F inner width,
V vocabulary, E experts, L layers, P width of the embeddings per layer.

Determinism. The result of a row depends on its sequence alone: not on how many rows or sequences
run with it, on chunking, on the ring's offset, on the pages, or on the thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import (
    Activation,
    AttentionSpec,
    ExpertSpec,
    KVType,
    RopeSpec,
    SamplingParams,
    Scheme,
)

Array = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`count` rows of the batch that are positions `[start, start + count)` of one sequence.

    In a layer that sees everything, position `p` is kept in cell
    `pages[p // page_len] * page_len + p % page_len`; in a sliding layer in cell
    `ring * ring_len + p % ring_len`. The keys before `start` are there, as far as a ring reaches.
    `adapter` is an index into the updates of every linear, None for the weights alone.
    """

    start: int
    count: int
    pages: Sequence[int]
    ring: int
    adapter: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The rows of one forward: their tokens, and the spans they form, in order.

    `states` [R, W] f32 come from another forward: that of a drafter's target, or of the layers
    before these. (The reference takes a tensor of torch, too, and lets gradients through.)
    """

    token_ids: Sequence[int]
    spans: Sequence[Span]
    states: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """The cells of one layer's cache: `num_cells` positions of G x D keys and values.

    `stride` is the length of a page (`sliding` False) or of a ring (`sliding` True). With
    `key_rope` the cells keep values only: a key is its value times the weight of the keys' norm,
    rotated by its position, and is made when it is read.
    """

    num_cells: int
    stride: int
    sliding: bool
    kv_heads: int
    head_dim: int
    kind: KVType
    key_rope: RopeSpec | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """What an adapter adds to a weight, `scale * b @ a`; a [rank, inputs] and b [outputs, rank].

    Its product is computed in f32 from unrounded activations, whatever the op set rounds elsewhere.
    """

    a: Array
    b: Array
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A packed weight [outputs, inputs] and an optional packed bias [outputs].

    `updates[i]` is what adapter `i` adds for the rows of its spans, None where it adds nothing; it
    is empty where no adapter does. Which rows are whose is known inside a step only.
    """

    weight: Array
    bias: Array | None = None
    updates: Sequence[LowRank | None] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The packed weights of E experts: `gate_up` [E, 2 * F, H], `down` [E, H, F], `scale` [E].

    The first F rows of an expert's `gate_up` are its gate, the others its up projection.
    """

    gate_up: Array
    down: Array
    scale: Array


Graph = Callable[[Rows, Sequence[int]], Sequence[Array]]
"""A model's forward in terms of ops: (rows, wanted rows) -> logits [wanted, V], states [wanted, H].

States are what the head was applied to: what a drafter goes on from.
"""


class Step(Protocol):
    """A forward that is ready to run, any number of rows at a time."""

    def __call__(self, rows: Rows, wanted: Sequence[int]) -> Sequence[np.ndarray]:
        """What the graph returns, in f32. The next step may overwrite it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How the token of a row of logits is chosen; `sequence` and `position` go into its noise."""

    sampling: SamplingParams
    sequence: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What came of a step that chose: a token for every wanted row, -1 where its logits hold a NaN,
    -2 where the best of them is not finite; how far the best logit was above the next [wanted]; and
    the states [wanted, H], if asked for."""

    tokens: list[int]
    margins: np.ndarray
    states: np.ndarray | None


@runtime_checkable
class Choosing(Protocol):
    """A step that can choose tokens where it computes logits, so that these need not be fetched.

    The tokens are those of `engine/sampling.py`, to the rounding of f64.
    """

    def able(self, draws: Sequence[Draw]) -> bool:
        """Whether it can for these draws."""
        ...

    def choose(
        self, rows: Rows, wanted: Sequence[int], draws: Sequence[Draw], *, states: bool
    ) -> Choice:
        """Runs the step and chooses a token for every wanted row."""
        ...


@runtime_checkable
class Preparing(Protocol):
    """A step that gets ready before it runs: it takes all memory that runs up to a size need, and
    whatever the first of them would have to wait for is done."""

    def prepare(self, rows: int, wanted: int, spans: int) -> None:
        """`wanted` rows with logits, of `spans` sequences. Raises `OutOfMemoryError`."""
        ...


class OpSet(Protocol):
    """About a score of ops. Every op takes and returns the op set's own arrays."""

    name: str

    @property
    def schemes(self) -> Collection[Scheme]:
        """The schemes that `pack` takes for a matrix; a vector is always f32."""
        ...

    @property
    def checks_finite(self) -> bool:
        """Whether `is_finite` costs nothing more: `pack` has every byte at hand, and looks."""
        ...

    def pack(self, q: QTensor) -> Array:
        """The op set's own layout of a stored tensor. Exact, and reversible by `unpack`."""
        ...

    def is_finite(self, packed: Array) -> bool:
        """Whether a packed matrix holds neither NaN nor infinity."""
        ...

    def unpack(self, packed: Array) -> QTensor:
        """The stored tensor again, bit for bit."""
        ...

    @property
    def packed_bytes(self) -> int:
        """What all the tensors packed so far take in memory."""
        ...

    def read_bandwidth(self) -> float | None:
        """Measured bytes per second that the op set can read from memory; None if not measured."""
        ...

    def new_kv(self, layout: KVLayout, key_norm: Array | None = None) -> Array:
        """An empty cache of one layer; `key_norm` [D] is needed where it keeps values only."""
        ...

    def embed(self, rows: Rows, table: Array, scale: float) -> Array:
        """[R, H]: the table's row of every token, times `scale`."""
        ...

    def given(self, rows: Rows, width: int, start: int = 0) -> Array:
        """[R, width]: of the states that came with the rows, the columns from `start` on."""
        ...

    def concat(self, first: Array, second: Array) -> Array:
        """[R, A + B]: the columns of the first [R, A], then those of the second [R, B]."""
        ...

    def rms_norm(self, x: Array, weight: Array | None, eps: float) -> Array:
        """[R, H]: `x / sqrt(mean(x^2) + eps) * weight`, in f32."""
        ...

    def linear(self, x: Array, linear: Linear) -> Array:
        """[R, outputs]: `x @ weight.T + bias`, and for the rows of an adapter its update."""
        ...

    def rope_and_store(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        q_norm: Array | None,
        k_norm: Array | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
        kv: Array,
    ) -> Array:
        """Norms per head, rotates by position, writes keys and values to the cache.

        q [R, N * D], k and v [R, G * D] straight from the projections; `v` may be `k` itself.
        Returns the rotated queries [R, N * D].
        """
        ...

    def rope(
        self,
        q: Array,
        *,
        q_norm: Array | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
    ) -> Array:
        """The queries of `rope_and_store`, in a layer that reads the cache of another.

        They are rotated as if `attention.ahead` positions later.
        """
        ...

    def attend(self, q: Array, *, attention: AttentionSpec, rows: Rows, kv: Array) -> Array:
        """[R, N * D]: causal softmax attention of every row over its own sequence's cache."""
        ...

    def residual(
        self,
        x: Array,
        update: Array,
        *,
        norm: Array | None = None,
        eps: float = 0.0,
        scalar: Array | None = None,
    ) -> Array:
        """[R, H]: `(x + update) * scalar`, the update normed first when `norm` is given."""
        ...

    def gated_mlp(
        self, x: Array, *, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Array:
        """[R, H]: `down(activation(gate(x)) * up(x))`."""
        ...

    def route_experts(
        self, x: Array, scores: Array, *, experts: Experts, spec: ExpertSpec, activation: Activation
    ) -> Array:
        """[R, H]: the weighted sum of the experts that each row goes through.

        x [R, H]; scores [R, E], whose product with `spec.score_scale` is put through a softmax. The
        `spec.used` likeliest experts are taken (of equal ones the lower index); the weight of one
        is its probability over the sum of theirs, times its `scale`. They are added up by
        ascending index.
        """
        ...

    def per_layer_inputs(
        self, tokens: Array, context: Array, *, norm: Array, eps: float, scale: float
    ) -> Array:
        """[R, L * P]: `(tokens + norm(context * scale)) / sqrt(2)`, normed over each P.

        tokens and context [R, L * P], norm [P].
        """
        ...

    def per_layer_update(
        self,
        x: Array,
        inputs: Array,
        layer: int,
        *,
        gate: Linear,
        out: Linear,
        activation: Activation,
    ) -> Array:
        """[R, H]: `out(activation(gate(x)) * own)`; `own` are the layer's P columns of `inputs`.

        inputs [R, L * P].
        """
        ...

    def select(self, x: Array, index: Sequence[int]) -> Array:
        """[len(index), H]: the rows named, in that order."""
        ...

    def logits(self, x: Array, head: Array, softcap: float | None) -> Array:
        """[R, V]: `x @ head.T`, then `softcap * tanh(. / softcap)` if there is one. f32."""
        ...

    def clustered_logits(self, x: Array, scores: Array, head: Array, used: int) -> Array:
        """[R, V]: `x @ head.T` in the `used` clusters of the best scores, -inf elsewhere.

        scores [R, C]; cluster `c` is the rows `[c * V / C, (c + 1) * V / C)` of the head. Of equal
        scores the lower cluster is taken.
        """
        ...

    def step(self, graph: Graph) -> Step:
        """The graph as a step: run op by op each time, or recorded once and replayed."""
        ...
