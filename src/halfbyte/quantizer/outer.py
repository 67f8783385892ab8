"""A model without its layers: what takes tokens in, and what makes logits of final states.

The tables stay as they are stored; an op decodes the rows that it needs, and the head all of it.
"""

from __future__ import annotations

from collections.abc import Mapping

from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.ops import Weight
from halfbyte.models.decoder import Decoder, Weights
from halfbyte.models.load import per_layer_weights
from halfbyte.numerics.qtensor import QTensor

EMBED, PER_LAYER, PROJECT = "embed.weight", "per_layer.embed.weight", "per_layer.project.weight"
NORM, HEAD = "norm.weight", "head.weight"


def outer(source: Source, ops: ReferenceOps, made: Mapping[str, QTensor] | None = None) -> Decoder:
    """The decoder of a source whose layers are given to it one at a time.

    The tensors of `made` take the place of the source's.
    """
    spec, made = source.spec, made or {}
    packed: dict[str, Weight] = {}
    for name in (tensor.name for tensor in spec.tensors()):
        if not name.startswith("layers."):
            q = made[name] if name in made else source.tensor(name)
            packed[name] = Weight(q) if name in (EMBED, PER_LAYER, HEAD) else ops.pack(q)
    weights = Weights(
        embed=packed[EMBED],
        per_layer=per_layer_weights(packed) if spec.per_layer else None,
        layers=(),
        norm=packed[NORM],
        head=packed[EMBED if spec.tied_head else HEAD],
    )
    return Decoder(spec, weights, ops)
