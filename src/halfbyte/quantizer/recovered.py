"""A source whose matrices lie on a Q4_0 lattice is one of q4_0 already: `Recovered` gives it so.

Checkpoints trained for Q4_0 are published in bf16, every weight a multiple of its block's scale.
Quantizing those anew would move blocks to another lattice; here they keep their own
(`numerics.lattice`), and count how many were found bit for bit. A matrix is looked at only if the
recipe would quantize it, and stays as it is if the recipe asks for what cannot hold a q4_0 block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add

from halfbyte.formats.checkpoint import Around, Source
from halfbyte.numerics.lattice import Counts, is_lattice, recover
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Recipe, Scheme, holds

Q4_0 = SCHEMES["q4_0"]


class Recovered(Around):
    """A source around a source. `recipe`: the one given, with q4_0 for what was found to lie on a
    lattice, unless it asked for a scheme that holds q4_0. Looks once through the weights."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        super().__init__(source)
        self._counts: dict[str, Counts] = {}
        found = {
            name: target
            for name, q in source.tensors()
            if (target := _target(recipe.scheme_for(name, q.shape))) is not None and is_lattice(q)
        }
        self.recipe = Recipe(
            name=recipe.name,
            rules=(*((name, to.name) for name, to in found.items()), *recipe.rules),
        )
        self.schemes: Mapping[str, Scheme] = {**source.schemes, **dict.fromkeys(found, Q4_0)}
        self.matrices = len(found)

    @property
    def counts(self) -> Counts:
        """Of all matrices given so far."""
        return reduce(add, self._counts.values(), Counts())

    def tensor(self, name: str) -> QTensor:
        return self._recovered(name, self._source.tensor(name))

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for name, q in self._source.tensors():
            yield name, self._recovered(name, q)

    def _recovered(self, name: str, q: QTensor) -> QTensor:
        if self.schemes[name] == q.scheme:
            return q
        q, self._counts[name] = recover(q)
        return q


def _target(wanted: Scheme) -> Scheme | None:
    """How a matrix on a lattice is stored where the recipe wants this; None for as before."""
    if wanted.is_float:
        return None
    if holds(wanted, Q4_0):
        return wanted
    return Q4_0 if wanted.ggml_type is not None else None
