"""Trained weights as a source: what a quantizer and a writer take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, ModelSpec, Scheme
from halfbyte.text.assets import TextAssets


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """The source of weights f32 in memory, by our names."""

    spec: ModelSpec
    weights: Mapping[str, Tensor]
    assets: TextAssets | None = None

    @property
    def schemes(self) -> Mapping[str, Scheme]:
        return {tensor.name: SCHEMES["f32"] for tensor in self.spec.tensors()}

    def tensor(self, name: str) -> QTensor:
        return encode(self.weights[name].detach().cpu(), SCHEMES["f32"])

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self.tensor(tensor.name)


def weights_of(source: Source) -> dict[str, Tensor]:
    """The weights f32 of a source, by our names."""
    return {name: decode(q).clone() for name, q in source.tensors()}
