"""A source becomes a running model: one tensor at a time, packed for an op set.

A scheme that the op set has no kernel for is converted here, to the smallest it has that holds
every value exactly; where there is none, loading fails before anything runs, and says why.
"""

from __future__ import annotations

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Array, Linear, OpSet
from halfbyte.models.decoder import Decoder, LayerWeights, Weights
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec, lossless_target


def load(source: Source, ops: OpSet, *, progress: Progress | None = None) -> Decoder:
    """The decoder of a source, its tensors packed for this op set.

    Peak memory: what the op set keeps, and the largest tensor.
    """
    packed: dict[str, Array] = {}
    shapes = {tensor.name: tensor.shape for tensor in source.spec.tensors()}
    done, total = 0, sum(source.schemes[name].bytes(shape) for name, shape in shapes.items())
    for name, q in source.tensors():
        packed[name] = ops.pack(_runnable(q, ops))
        done += q.nbytes
        if progress is not None:
            progress(done, total)
    return Decoder(source.spec, _weights(source.spec, packed), ops)


def _runnable(q: QTensor, ops: OpSet) -> QTensor:
    """The tensor in a scheme that the op set runs and that holds every value of it."""
    available = ops.schemes if len(q.shape) > 1 else (SCHEMES["f32"],)
    target = lossless_target(q.scheme, available)
    if target == q.scheme:
        return q
    from halfbyte.numerics.codec import convert  # brings torch, which most files do without

    return convert(q, target)


def _weights(spec: ModelSpec, packed: dict[str, Array]) -> Weights:
    embed = packed["embed.weight"]
    return Weights(
        embed=embed,
        layers=[_layer(packed, f"layers.{index}") for index in range(len(spec.layers))],
        norm=packed["norm.weight"],
        head=embed if spec.tied_head else packed["head.weight"],
    )


def _layer(packed: dict[str, Array], at: str) -> LayerWeights:
    def linear(name: str) -> Linear:
        return Linear(weight=packed[f"{at}.{name}.weight"], bias=packed.get(f"{at}.{name}.bias"))

    return LayerWeights(
        attn_norm=packed[f"{at}.attn_norm.weight"],
        q=linear("attn.q"),
        k=linear("attn.k"),
        v=linear("attn.v") if f"{at}.attn.v.weight" in packed else None,
        q_norm=packed.get(f"{at}.attn.q_norm.weight"),
        k_norm=packed.get(f"{at}.attn.k_norm.weight"),
        o=linear("attn.o"),
        attn_post_norm=packed.get(f"{at}.attn_post_norm.weight"),
        mlp_norm=packed[f"{at}.mlp_norm.weight"],
        gate=linear("mlp.gate"),
        up=linear("mlp.up"),
        down=linear("mlp.down"),
        mlp_post_norm=packed.get(f"{at}.mlp_post_norm.weight"),
        scalar=packed.get(f"{at}.scalar"),
    )
