"""A source becomes a running model: one tensor at a time, packed for an op set.

An op set that lacks a scheme refuses here, before anything runs, and says why.
"""

from __future__ import annotations

from halfbyte.errors import UnsupportedError
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Array, Linear, OpSet
from halfbyte.models.decoder import Decoder, LayerWeights, Weights
from halfbyte.specs import ModelSpec


def load(source: Source, ops: OpSet, *, progress: Progress | None = None) -> Decoder:
    """The decoder of a source, its tensors packed for this op set.

    Peak memory: what the op set keeps, and the largest tensor.
    """
    packed: dict[str, Array] = {}
    shapes = {tensor.name: tensor.shape for tensor in source.spec.tensors()}
    done, total = 0, sum(source.schemes[name].bytes(shape) for name, shape in shapes.items())
    for name, q in source.tensors():
        refusal = ops.refuses(q)
        if refusal is not None:
            raise UnsupportedError(f"the {ops.name} op set cannot run it: {refusal}", where=name)
        packed[name] = ops.pack(q)
        done += q.nbytes
        if progress is not None:
            progress(done, total)
    return Decoder(source.spec, _weights(source.spec, packed), ops)


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
