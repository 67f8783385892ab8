"""A source becomes a running model: one tensor at a time, packed for an op set.

A scheme that the op set has no kernel for is converted here, to the smallest it has that holds
every value exactly; where there is none, loading fails before anything runs, and says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.formats.checkpoint import Checkpoint, Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Array, Experts, Linear, LowRank, OpSet
from halfbyte.kernels.cpu import CPUOps
from halfbyte.kernels.relay import Front
from halfbyte.kernels.triton import TritonOps
from halfbyte.models.decoder import (
    Decoder,
    GateWeights,
    LayerWeights,
    MixtureWeights,
    PerLayerWeights,
    Weights,
)
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import (
    SCHEMES,
    ModelSpec,
    Part,
    Scheme,
    TensorSpec,
    check_cut,
    lossless_target,
    paired_layers,
    parts_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from halfbyte.formats.lora import Adapter
    from halfbyte.models.drafter import DraftModel

Updates = Mapping[str, tuple[LowRank | None, ...]]
"""Name of a weight -> what each adapter adds to it; weights that none changes are left out."""
NO_UPDATES: Updates = {}
EMBED = "embed.weight"
# The op sets that say what a tensor would take.
Outlining = CPUOps | TritonOps
TOKENS = ".tokens"  # whole numbers that a drafter keeps apart


def load(
    source: Source,
    ops: OpSet,
    *,
    front: Front | None = None,
    adapters: Mapping[str, Adapter] | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """The decoder of a source, its tensors packed for this op set, with adapters by name; its first
    layers are packed for that of `front`, if there is one.

    Peak memory: what the op sets keep, and the largest tensor.
    """
    spec = source.spec
    _refuse_drafter(spec)
    shares = _shares(spec, ops, front)
    for share in shares:
        _reserve(source, share)
    for name, q in _watched(source, [share.ops for share in shares], progress):
        for share in shares:
            if spec.holds(share.part, name):
                share.packed[name] = _pack(name, q, share.ops)
    decoder: Decoder | None = None
    for share in shares:
        decoder = share.decoder(spec, adapters or {}, decoder)
    assert decoder is not None, "somebody has the layers"
    return decoder


@dataclass(frozen=True, slots=True)
class _Share:
    """A part of a model, the op set that it is for, and its tensors by our names."""

    ops: OpSet
    part: Part
    packed: dict[str, Array] = field(default_factory=dict[str, Array])

    def decoder(
        self, spec: ModelSpec, adapters: Mapping[str, Adapter], front: Decoder | None
    ) -> Decoder:
        """The layers, behind those of `front`, with what adapters add to them."""
        before = self.ops.packed_bytes
        columns = [_packed_adapter(it, spec, self.part, self.ops) for it in adapters.values()]
        embed = self.packed.get(EMBED)
        return Decoder(
            spec,
            _weights(spec, self.packed, _by_weight(columns), embed=embed, part=self.part),
            self.ops,
            adapters=tuple(adapters),
            adapter_bytes=self.ops.packed_bytes - before,
            part=self.part,
            front=front,
        )


def _shares(spec: ModelSpec, ops: OpSet, front: Front | None) -> list[_Share]:
    """Who has what of a model, in the order of its layers."""
    if front is None:
        return [_Share(ops, spec.whole)]
    check_cut(spec, front.card_layers)
    before, behind = parts_of(spec, front.card_layers)
    return [_Share(front.ops, before), _Share(ops, behind)]


def outline(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    ops: Outlining,
    adapters: Sequence[Adapter] = (),
    *,
    part: Part | None = None,
) -> Decoder:
    """The decoder of a model, or of a part of it, whose weights are not there; what it would take
    can be asked for."""
    _refuse_drafter(spec)
    part = spec.whole if part is None else part
    packed = _outlined(spec.held(part), schemes, ops)
    updates = _by_weight([outline_adapter(it, spec, part, ops) for it in adapters])
    weights = _weights(spec, packed, updates, embed=packed.get(EMBED), part=part)
    return Decoder(spec, weights, ops, part=part)


def outline_drafter(
    spec: ModelSpec, schemes: Mapping[str, Scheme], target: Decoder, ops: Outlining
) -> DraftModel:
    """A drafter that is not there, beside a target that need not be."""
    packed = _outlined(spec.tensors(), schemes, ops)
    return assembled_drafter(spec, packed, target)


def _outlined(
    tensors: Iterable[TensorSpec], schemes: Mapping[str, Scheme], ops: Outlining
) -> dict[str, Array]:
    return {
        tensor.name: ops.outline(_target(schemes[tensor.name], tensor.shape, ops), tensor.shape)
        for tensor in tensors
        if not tensor.name.endswith(TOKENS)
    }


def outline_adapter(
    adapter: Adapter, spec: ModelSpec, part: Part, ops: Outlining
) -> dict[str, LowRank]:
    """By the names of weights, what an adapter that is not there would add to those of a part."""
    found: dict[str, LowRank] = {}
    for module, update in adapter.updates.items():
        if not spec.holds(part, update.weight):
            continue
        scheme = adapter.stored.pairs[module][0].scheme
        a, b = (ops.outline(_target(scheme, shape, ops), shape) for shape in update.shapes)
        found[update.weight] = LowRank(a=a, b=b, scale=update.scale)
    return found


def _refuse_drafter(spec: ModelSpec) -> None:
    if spec.drafter is not None:
        raise UnsupportedError(
            "a drafter, which does not run alone", hint="give its target as MODEL, and --drafter"
        )


def load_drafter(
    source: Source, target: Decoder, *, progress: Progress | None = None
) -> DraftModel:
    """The drafter of a source beside its target, packed for the same op set.

    Raises `InvalidInputError` for a drafter of another target.
    """
    ops = target.ops
    paired_layers(source.spec, target.spec)
    clusters = _tokens(source, "centroids.tokens")
    packed: dict[str, Array] = {}
    for name, q in _watched(source, [ops], progress):
        if name == "head.weight" and clusters is not None:
            q = q.take_rows(clusters)  # a cluster's rows lie together
        if not name.endswith(TOKENS):
            packed[name] = _pack(name, q, ops)
    tokens = _tokens(source, "head.tokens") if clusters is None else clusters
    return assembled_drafter(source.spec, packed, target, tokens=tokens)


def assembled_drafter(
    spec: ModelSpec,
    packed: Mapping[str, Array],
    target: Decoder,
    *,
    tokens: NDArray[np.intp] | None = None,
) -> DraftModel:
    """The drafter of tensors that are packed for its target's op set; `tokens` as in DraftModel."""
    from halfbyte.models.drafter import DraftModel

    whole = _Packed(packed, NO_UPDATES, "")
    weights = _weights(spec, packed, NO_UPDATES, embed=target.weights.embed)
    return DraftModel(
        Decoder(spec, weights, target.ops),
        pre=whole.linear("pre"),
        post=whole.linear("post"),
        centroids=whole.get_linear("centroids"),
        tokens=tokens,
        target=target.spec,
        reads=paired_layers(spec, target.spec),
    )


def _tokens(source: Source, name: str) -> NDArray[np.intp] | None:
    """The token ids of a tensor, each different and in the vocabulary; None if there is none."""
    if name not in source.schemes:
        return None
    ids = source.tensor(name).data.view("<f4")[0].astype(np.intp)
    if len(np.unique(ids)) < len(ids) or ids.min() < 0 or ids.max() >= source.spec.vocab:
        raise IntegrityError("holds ids twice, or outside the vocabulary", where=name)
    return ids


def _pack(name: str, q: QTensor, ops: OpSet) -> Array:
    packed = ops.pack(_runnable(q, ops))
    if ops.checks_finite and len(q.shape) > 1 and not ops.is_finite(packed):
        raise IntegrityError("holds NaN or infinite weights", where=name)
    return packed


def _reserve(source: Source, share: _Share) -> None:
    """On a GPU, takes the memory of all weights in one piece: single ones would be rounded up."""
    if isinstance(ops := share.ops, TritonOps):
        tensors = source.spec.held(share.part)
        ops.reserve([(_target(source.schemes[it.name], it.shape, ops), it.shape) for it in tensors])


def _watched(
    source: Source, every: Sequence[OpSet], progress: Progress | None
) -> Iterator[tuple[str, QTensor]]:
    """The tensors of a source, finite or for `_pack` to check; `progress` is told of the bytes."""
    shapes = {tensor.name: tensor.shape for tensor in source.spec.tensors()}
    done, total = 0, sum(source.schemes[name].bytes(shape) for name, shape in shapes.items())
    checked = [set(ops.schemes) if ops.checks_finite else set[Scheme]() for ops in every]
    checking = set.intersection(*checked)
    whole = isinstance(source, Checkpoint)
    for name, q in source.tensors_for(checking) if whole else source.tensors():
        yield name, q
        done += q.nbytes
        if progress is not None:
            progress(done, total)


def _by_weight(columns: Sequence[Mapping[str, LowRank]]) -> Updates:
    """What every adapter adds to a weight, for the weights that any of them changes."""
    changed = {weight for column in columns for weight in column}
    return {weight: tuple(column.get(weight) for column in columns) for weight in changed}


def _packed_adapter(
    adapter: Adapter, spec: ModelSpec, part: Part, ops: OpSet
) -> dict[str, LowRank]:
    packed: dict[str, LowRank] = {}
    for module, update in adapter.updates.items():
        if not spec.holds(part, update.weight):
            continue
        a, b = (ops.pack(_runnable(q, ops)) for q in adapter.tensors(module))
        packed[update.weight] = LowRank(a=a, b=b, scale=update.scale)
    return packed


def _runnable(q: QTensor, ops: OpSet) -> QTensor:
    """The tensor in a scheme that the op set runs and that holds every value of it."""
    target = _target(q.scheme, q.shape, ops)
    if target == q.scheme:
        return q
    from halfbyte.numerics.codec import convert_exactly  # brings torch; most files do without

    return convert_exactly(q, target)


def _target(scheme: Scheme, shape: Sequence[int], ops: OpSet) -> Scheme:
    available = ops.schemes if len(shape) > 1 else (SCHEMES["f32"],)
    return lossless_target(scheme, available)


def _weights(
    spec: ModelSpec,
    packed: Mapping[str, Array],
    updates: Updates,
    *,
    embed: Array,
    part: Part | None = None,
) -> Weights:
    """The weights of a part, or of all."""
    part = spec.whole if part is None else part
    own = spec.per_layer is not None and part.begins
    return Weights(
        embed=embed,
        per_layer=per_layer_weights(packed, updates) if own else None,
        layers=[layer_weights(packed, spec, index, updates) for index in part.layers],
        norm=packed.get("norm.weight"),
        head=embed if spec.tied_head else packed.get("head.weight"),
    )


@dataclass(frozen=True, slots=True)
class _Packed:
    """Packed tensors under a beginning of their names, and the updates of linears."""

    tensors: Mapping[str, Array]
    updates: Updates
    at: str

    def __getitem__(self, name: str) -> Array:
        return self.tensors[self.at + name]

    def get(self, name: str) -> Array | None:
        return self.tensors.get(self.at + name)

    def linear(self, name: str) -> Linear:
        return Linear(
            weight=self[f"{name}.weight"],
            bias=self.get(f"{name}.bias"),
            updates=self.updates.get(f"{self.at}{name}.weight", ()),
        )

    def get_linear(self, name: str) -> Linear | None:
        return None if self.get(f"{name}.weight") is None else self.linear(name)


def per_layer_weights(
    tensors: Mapping[str, Array], updates: Updates = NO_UPDATES
) -> PerLayerWeights:
    """Where the embeddings per layer come from, among packed tensors by our names."""
    packed = _Packed(tensors, updates, "per_layer.")
    return PerLayerWeights(
        embed=packed["embed.weight"],
        project=packed.linear("project"),
        norm=packed["norm.weight"],
    )


def layer_weights(
    tensors: Mapping[str, Array], spec: ModelSpec, index: int, updates: Updates = NO_UPDATES
) -> LayerWeights:
    """Layer `index` among packed tensors by our names."""
    packed, layer = _Packed(tensors, updates, f"layers.{index}."), spec.layers[index]
    return LayerWeights(
        attn_norm=packed["attn_norm.weight"],
        q=packed.linear("attn.q"),
        k=packed.get_linear("attn.k"),
        v=packed.get_linear("attn.v"),
        q_norm=packed.get("attn.q_norm.weight"),
        k_norm=packed.get("attn.k_norm.weight"),
        o=packed.linear("attn.o"),
        attn_post_norm=packed.get("attn_post_norm.weight"),
        mlp_norm=packed["mlp_norm.weight"],
        gate=packed.linear("mlp.gate"),
        up=packed.linear("mlp.up"),
        down=packed.linear("mlp.down"),
        mixture=None if layer.experts is None else _mixture(packed),
        mlp_post_norm=packed.get("mlp_post_norm.weight"),
        per_layer=_gate(packed),
        scalar=packed.get("scalar"),
    )


def _mixture(packed: _Packed) -> MixtureWeights:
    return MixtureWeights(
        mlp_own_norm=packed["mlp_own_norm.weight"],
        router_scale=packed["router.scale"],
        router=packed.linear("router"),
        experts_norm=packed["experts_norm.weight"],
        experts=Experts(
            gate_up=packed["experts.gate_up.weight"],
            down=packed["experts.down.weight"],
            scale=packed["experts.scale"],
        ),
        experts_own_norm=packed["experts_own_norm.weight"],
    )


def _gate(packed: _Packed) -> GateWeights | None:
    gate = packed.get_linear("per_layer.gate")
    if gate is None:
        return None
    return GateWeights(
        gate=gate, out=packed.linear("per_layer.out"), norm=packed["per_layer.norm.weight"]
    )
