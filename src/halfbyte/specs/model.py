"""What a model *is*, as numbers: one `ModelSpec` per model, a `LayerSpec` per layer.

The decoder, the loader, the planner and the writers read this and nothing else; a family file
produces it from a config.json or from GGUF metadata. It names every tensor of the model with its
shape (`ModelSpec.tensors`), which is the ground truth for parameter counts, loading and recipes.

It is not a configuration of the run: context in use, cache types and devices live elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import isinf, prod
from typing import Literal

from halfbyte.errors import IntegrityError
from halfbyte.specs.drafter import DrafterSpec

Activation = Literal["silu", "gelu_tanh"]
LAYERS, FINAL_NORM, HEAD = "layers.", "norm.weight", "head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary positions of one kind of layer.

    The rotation of pair `i` (of `head_dim / 2`) by position `p` is the angle
    `p * theta ** (-2 i / head_dim) / divisors[i]`; pairs are `(i, i + head_dim / 2)`.
    Every published scaling (linear, llama3, proportional) is a list of divisors. An infinite
    divisor leaves the pair unrotated. `scaling` says in words where the divisors come from; it
    takes no part in comparisons.
    """

    theta: float
    divisors: tuple[float, ...] | None = None
    scaling: str = field(default="none", compare=False)

    @property
    def linear_factor(self) -> float | None:
        """The one divisor of all pairs, if they share one; positions are scaled by its inverse."""
        if self.divisors is None or len(set(self.divisors)) > 1 or isinf(self.divisors[0]):
            return None
        return self.divisors[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """One layer's attention. Query head `h` reads key/value head `h // (heads // kv_heads)`.

    `window` is the number of positions a query sees including its own; None is all of them.
    `shares_kv` means there is no value projection: the value is the raw key projection
    (before `key_norm` and before the rotation), normed without a weight if `value_norm`.
    `ahead`: a query is rotated as if it were so many positions after the last key that it sees
    (a drafter's; 0 is its own).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec
    scale: float
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    value_norm: bool = False
    shares_kv: bool = False
    ahead: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise IntegrityError(
                f"{self.heads} heads cannot share {self.kv_heads} key/value heads evenly"
            )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """A gated MLP: `down(activation(gate(x)) * up(x))`, inner width `width`."""

    width: int
    activation: Activation
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSpec:
    """A mixture of gated MLPs of inner width `width`, beside the layer's own MLP.

    A router scores all `count` experts on the normed hidden state; the softmax of the scores times
    `score_scale` is taken, and a row goes through the `used` likeliest, which are weighted by their
    probability over the sum of theirs, times a stored number of the expert. The mixture's output
    and the MLP's are normed apart, and added. Activation as in the layer's MLP.
    """

    count: int
    used: int
    width: int
    score_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: norm, attention, residual, norm, MLP, residual.

    `experts`: a mixture of experts beside the MLP. `kv_source`: the layer before this one whose
    keys and values it reads; it has no projections for them and keeps none. In a drafter it is
    negative and counts from the end of the target's layers that see as far (all, or a window) and
    keep their own: -1 is the last. `post_norms`: the
    output of attention and of the MLP is normed before it joins the residual. `scalar`: the hidden
    state is multiplied by one stored number at the end of the layer.
    """

    attention: AttentionSpec
    mlp: MLPSpec
    experts: ExpertSpec | None = None
    kv_source: int | None = None
    post_norms: bool = False
    scalar: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PerLayerSpec:
    """Embeddings of `width` numbers per token and layer, let in through a gate as a layer ends.

    They are the sum, over sqrt(2), of two parts: the rows of a table times `token_scale`, and a
    projection of the token's scaled embedding, times `context_scale` and normed.
    """

    width: int
    token_scale: float
    context_scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One stored tensor: our name and its shape, rows first (`[outputs, inputs]`)."""

    name: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """A run of a model's layers: with the embeddings where it `begins`, with the final norm and the
    head where it `ends`."""

    layers: range
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only language model. `embed_scale` multiplies the embedding of every token.

    `per_layer`: every token has an embedding for each layer, too. `drafter`: the model drafts for
    another, whose embeddings, states and keys it reads.
    """

    family: str
    architecture: str
    hidden: int
    vocab: int
    context: int
    norm_eps: float
    tied_head: bool
    layers: tuple[LayerSpec, ...]
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    per_layer: PerLayerSpec | None = None
    drafter: DrafterSpec | None = None

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor the model stores, in the order of the forward pass."""
        for name, shape in (*self._inputs(), *self._body(), *self._outputs()):
            yield TensorSpec(name=name, shape=shape)

    @property
    def whole(self) -> Part:
        """All of it."""
        return Part(range(len(self.layers)))

    def held(self, part: Part) -> Iterator[TensorSpec]:
        """The tensors of a part. Those of a tied head are held at both ends."""
        return (tensor for tensor in self.tensors() if self.holds(part, tensor.name))

    def holds(self, part: Part, name: str) -> bool:
        """Whether a tensor is among those of a part."""
        if name.startswith(LAYERS):
            return int(name[len(LAYERS) :].partition(".")[0]) in part.layers
        if name in (FINAL_NORM, HEAD):
            return part.ends
        return part.begins or (part.ends and name == self.head_name)

    def _inputs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.drafter is not None:
            yield from self.drafter.input_tensors(self.hidden)
            return
        yield "embed.weight", (self.vocab, self.hidden)
        if self.per_layer is not None:
            width = len(self.layers) * self.per_layer.width
            yield "per_layer.embed.weight", (self.vocab, width)
            yield "per_layer.project.weight", (width, self.hidden)
            yield "per_layer.norm.weight", (self.per_layer.width,)

    def _body(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        inner = 0 if self.per_layer is None else self.per_layer.width
        for index, layer in enumerate(self.layers):
            for name, shape in _layer_tensors(layer, self.hidden, inner):
                yield f"{LAYERS}{index}.{name}", shape
        yield FINAL_NORM, (self.hidden,)

    def _outputs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        if self.drafter is not None:
            yield from self.drafter.output_tensors(self.hidden, self.vocab)
        elif not self.tied_head:
            yield HEAD, (self.vocab, self.hidden)

    @property
    def head_name(self) -> str:
        """The tensor that makes logits of final states."""
        return "embed.weight" if self.tied_head else HEAD

    @property
    def parameters(self) -> int:
        """Stored numbers; a tied head counts once, layer scalars count."""
        return sum(tensor.count for tensor in self.tensors())

    @property
    def windows(self) -> tuple[int, ...]:
        """The distinct sliding windows, ascending; empty when every layer sees everything."""
        windows = {layer.attention.window for layer in self.layers}
        return tuple(sorted(window for window in windows if window is not None))

    @property
    def unshared(self) -> ModelSpec:
        """The same model with nothing shared; checkpoints may store what this one does not need.

        What a drafter reads of its target is never its own.
        """
        if self.drafter is not None:
            return self
        layers = tuple(replace(layer, kv_source=None) for layer in self.layers)
        return replace(self, tied_head=False, layers=layers)


def _layer_tensors(
    layer: LayerSpec, hidden: int, per_layer_width: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "attn_norm.weight", (hidden,)
    yield from _attention_tensors(layer, hidden)
    if layer.post_norms:
        yield "attn_post_norm.weight", (hidden,)
    yield "mlp_norm.weight", (hidden,)
    yield from _mlp_tensors(layer.mlp, hidden)
    if layer.experts is not None:
        yield from _expert_tensors(layer.experts, hidden)
    if layer.post_norms:
        yield "mlp_post_norm.weight", (hidden,)
    if per_layer_width:
        yield "per_layer.gate.weight", (per_layer_width, hidden)
        yield "per_layer.out.weight", (hidden, per_layer_width)
        yield "per_layer.norm.weight", (hidden,)
    if layer.scalar:
        yield "scalar", (1,)


def _attention_tensors(layer: LayerSpec, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    attention = layer.attention
    yield "attn.q.weight", (attention.query_width, hidden)
    if attention.qkv_bias:
        yield "attn.q.bias", (attention.query_width,)
    parts = ("k",) if attention.shares_kv else ("k", "v")
    for part in () if layer.kv_source is not None else parts:
        yield f"attn.{part}.weight", (attention.kv_width, hidden)
        if attention.qkv_bias:
            yield f"attn.{part}.bias", (attention.kv_width,)
    if attention.qk_norm:
        yield "attn.q_norm.weight", (attention.head_dim,)
        if layer.kv_source is None:
            yield "attn.k_norm.weight", (attention.head_dim,)
    yield "attn.o.weight", (hidden, attention.query_width)
    if attention.output_bias:
        yield "attn.o.bias", (hidden,)


def _mlp_tensors(mlp: MLPSpec, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, shape in (
        ("gate", (mlp.width, hidden)),
        ("up", (mlp.width, hidden)),
        ("down", (hidden, mlp.width)),
    ):
        yield f"mlp.{part}.weight", shape
        if mlp.bias:
            yield f"mlp.{part}.bias", shape[:1]


def _expert_tensors(experts: ExpertSpec, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """In `gate_up`, the rows of an expert's gate come before those of its up projection."""
    yield "mlp_own_norm.weight", (hidden,)
    yield "router.scale", (hidden,)
    yield "router.weight", (experts.count, hidden)
    yield "experts_norm.weight", (hidden,)
    yield "experts.gate_up.weight", (experts.count, 2 * experts.width, hidden)
    yield "experts.down.weight", (experts.count, hidden, experts.width)
    yield "experts.scale", (experts.count,)
    yield "experts_own_norm.weight", (hidden,)
