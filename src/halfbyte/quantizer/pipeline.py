"""Quantizing as a source: the tensors of another source, each stored as the recipe says.

Nothing is computed until a tensor is asked for, and one tensor is held at a time, so quantizing
to a file needs the memory of the largest tensor, whatever the model's size. The integers and
scales that come out are the bytes a writer stores and a runtime runs.

What it refuses: weights that are already quantized. Rounding somebody's dequantized weights again
changes 13 to 100 % of the blocks; start from the original checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Around, Checkpoint, Source
from halfbyte.numerics.codec import convert
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import Method, Recipe, Scheme, holds


class Quantized(Around):
    """A source whose tensors are converted by a recipe on their way through.

    `method`: "rtn" rounds to nearest as the format's reference does, "search" chooses each scale
    by the least squared error.
    """

    def __init__(self, source: Source, recipe: Recipe, *, method: Method = "search") -> None:
        super().__init__(source)
        self.recipe = recipe
        self.method: Method = method
        self.schemes = schemes_of(source, recipe)

    def tensor(self, name: str) -> QTensor:
        return self._convert(name, self._source.tensor(name))

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for name, q in self._source.tensors():
            yield name, self._convert(name, q)

    def _convert(self, name: str, q: QTensor) -> QTensor:
        return convert(q, self.schemes[name], method=self.method)


def refuse_decoded(source: Checkpoint, schemes: Mapping[str, Scheme]) -> None:
    """Raises `InvalidInputError` for a matrix that its makers quantized, to be rounded again."""
    for name, reason in source.decoded.items():
        if schemes[name].name != "f32":
            raise InvalidInputError(
                f"was quantized by its makers and is f32 only to be exact ({reason}); "
                f"rounding it to {schemes[name].name} would damage it",
                where=name,
                hint="quantize the original checkpoint instead",
            )


def schemes_of(source: Source, recipe: Recipe) -> Mapping[str, Scheme]:
    """How a recipe stores each tensor of a source.

    Raises `InvalidInputError` for a tensor that is quantized already, to what cannot hold it.
    """
    wanted = {
        tensor.name: recipe.scheme_for(tensor.name, tensor.shape)
        for tensor in source.spec.tensors()
    }
    for name, scheme in source.schemes.items():
        target = wanted[name]
        if not scheme.is_float and not holds(target, scheme):
            raise InvalidInputError(
                f"is stored as {scheme.name}; rounding it again to {target.name} would damage it",
                where=name,
                hint="quantize the original checkpoint instead",
            )
    return wanted
