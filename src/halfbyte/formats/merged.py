"""A model with LoRA adapters merged into its weights, in f32: what they make of it, as one model.

A weight that an adapter changes becomes `W + scale * B @ A`, is computed in f32 and stays f32; all
others are given as they are stored. One tensor at a time, as with every source.

What it refuses: weights that are quantized. An adapter beside them is exact; merged into them, they
would be rounded again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Around, Source
from halfbyte.formats.finite import check_finite
from halfbyte.formats.lora import Adapter
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Scheme

F32 = SCHEMES["f32"]


class Merged(Around):
    """A source with adapters that fit it; where several change a weight, all of them do.

    Raises `InvalidInputError` for an adapter of a weight that is quantized.
    """

    def __init__(self, source: Source, adapters: Sequence[Adapter]) -> None:
        super().__init__(source)
        self._adapters = adapters
        changed = {update.weight for it in adapters for update in it.updates.values()}
        for name in changed:
            _refuse_quantized(name, source.schemes[name])
        self.schemes: Mapping[str, Scheme] = {
            name: F32 if name in changed else scheme for name, scheme in source.schemes.items()
        }

    def tensor(self, name: str) -> QTensor:
        return self._merged(name, self._source.tensor(name))

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for name, q in self._source.tensors():
            yield name, self._merged(name, q)

    def _merged(self, name: str, q: QTensor) -> QTensor:
        changes = [
            (adapter, module, update.scale)
            for adapter in self._adapters
            for module, update in adapter.updates.items()
            if update.weight == name
        ]
        if not changes:
            return q
        weight = decode(q).clone()
        for adapter, module, scale in changes:
            a, b = map(decode, adapter.tensors(module))
            weight.addmm_(b, a, alpha=scale)
        merged = encode(weight, F32)
        check_finite(merged, name=name)
        return merged


def _refuse_quantized(name: str, scheme: Scheme) -> None:
    if not scheme.is_float:
        raise InvalidInputError(
            f"is stored as {scheme.name}; an adapter is merged into weights that are not quantized",
            where=name,
            hint="name the original checkpoint, or keep the adapter apart: run --lora",
        )
