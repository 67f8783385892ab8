"""What a low-rank adapter is, as numbers: which linears it changes, by what rank and scale.

An adapter adds `scale * B @ A` to the weight of some linears of a model, A [rank, inputs] and
B [outputs, rank]. The weight itself stays as it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.specs.model import ModelSpec, TensorSpec
from halfbyte.specs.scheme import Scheme

EMBEDDINGS = ("embed.weight", "per_layer.embed.weight", "head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankSpec:
    """The update of one linear; `weight` is our name of the tensor it is added to."""

    weight: str
    inputs: int
    outputs: int
    rank: int
    scale: float

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of A and of B."""
        return (self.rank, self.inputs), (self.outputs, self.rank)

    def bytes(self, scheme: Scheme) -> int:
        """What A and B take, stored in `scheme`."""
        return sum(scheme.bytes(shape) for shape in self.shapes)


def linears(spec: ModelSpec) -> Iterator[TensorSpec]:
    """The weights that an adapter may change: every matrix but embeddings, head and experts."""
    for tensor in spec.tensors():
        if len(tensor.shape) == 2 and tensor.name not in EMBEDDINGS:
            yield tensor
