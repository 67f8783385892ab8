"""One matrix in several tensors, and a file of such matrices that reads like any other.

A `Packing` knows one package's layout: which parts a matrix has, what scheme and shape they come
to, and how they become one `QTensor`. Nothing is looked at before it is asked for, so a packed
tensor of another modality costs nothing and cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from halfbyte.errors import IntegrityError
from halfbyte.formats.safetensors import SafetensorsFile
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import Scheme


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one packed matrix: those of `endings` that the files have under `module`."""

    module: str
    endings: Collection[str]
    files: Mapping[str, SafetensorsFile]

    def __contains__(self, ending: str) -> bool:
        return self._name(ending) in self.files

    def names(self) -> Iterator[str]:
        return (self._name(ending) for ending in self.endings if ending in self)

    def array(self, ending: str, dtypes: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The part as numbers (bf16 as its bits). `dtypes`: the types that are right, as in
        "F16 BF16". A missing part, another type or shape is an `IntegrityError` that names it."""
        name = self._name(ending)
        if name not in self.files:
            raise IntegrityError("is missing", where=name)
        info = self.files[name].infos[name]
        if info.dtype not in dtypes.split():
            raise IntegrityError(f"is stored as {info.dtype}, not {dtypes}", where=name)
        if shape is not None and info.shape != shape:
            raise IntegrityError(f"has the shape {info.shape}, not {shape}", where=name)
        return self.files[name].array(name)

    def shape(self, ending: str, dtypes: str, axes: int) -> tuple[int, ...]:
        """The shape of a part, which must have that many axes."""
        found = self.array(ending, dtypes).shape
        if len(found) != axes or not all(found):
            raise IntegrityError(f"cannot have the shape {found}", where=self._name(ending))
        return found

    def dtype(self, ending: str, dtypes: str) -> str:
        """The type of a part, one of `dtypes`."""
        self.array(ending, dtypes)
        name = self._name(ending)
        return self.files[name].infos[name].dtype

    def release(self) -> None:
        for name in self.names():
            self.files[name].release(name)

    def _name(self, ending: str) -> str:
        return f"{self.module}.{ending}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a packed matrix comes to. `decoded`: why in f32, where that is so."""

    scheme: Scheme
    shape: tuple[int, int]
    decoded: str | None = None


class Packing(Protocol):
    """One package's layout. `mark`: the ending that each of its matrices has; `parts`: all of
    them that may be there."""

    @property
    def mark(self) -> str: ...

    @property
    def parts(self) -> Collection[str]: ...

    def describe(self, parts: Parts) -> Description: ...

    def unpack(self, parts: Parts) -> QTensor: ...


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """What is known of a packed matrix before its weights are read."""

    packing: Packing
    parts: Parts

    @property
    def scheme(self) -> Scheme:
        return self.description.scheme

    @property
    def shape(self) -> tuple[int, ...]:
        return self.description.shape

    @cached_property
    def description(self) -> Description:
        return self.packing.describe(self.parts)


class PackedFile:
    """Packed matrices by the names of their weights, to be read like those of a plain file."""

    def __init__(self, packing: Packing, matrices: Mapping[str, Parts]) -> None:
        self.infos = {
            name: PackedMatrix(packing=packing, parts=parts) for name, parts in matrices.items()
        }

    def tensor(self, name: str) -> QTensor:
        matrix = self.infos[name]
        return matrix.packing.unpack(matrix.parts)

    def release(self, name: str) -> None:
        self.infos[name].parts.release()


TensorFile = SafetensorsFile | PackedFile
