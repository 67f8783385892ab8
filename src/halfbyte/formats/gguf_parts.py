"""A GGUF model in one file, or in the parts that llama-gguf-split makes of it.

The parts are NAME-00001-of-0000N.gguf and so on, each a GGUF whose metadata counts it: split.no
from 0, split.count, and split.tensors.count over all of them. The model's own metadata is in the
first alone. Any part stands for the whole; a part that is missing is named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

from halfbyte.errors import IntegrityError
from halfbyte.families import Header
from halfbyte.formats.gguf import GGUFFile

PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
ROPE_FREQS = "rope_freqs.weight"
STORED_INFINITY = 1e29  # converters write 1e30 for "this pair does not rotate"


def part_paths(path: Path) -> list[Path]:
    """The files of the model that `path` is, or is a part of; whether they exist or not."""
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    stem, count = named["stem"], named["count"]
    return [
        path.with_name(f"{stem}-{number:05}-of-{count}.gguf")
        for number in range(1, int(count) + 1)
    ]  # fmt: skip


class GGUFModel:
    """All the parts: `metadata` of the first, and `places`, tensor name -> the file that has it.

    Raises `IntegrityError` for a part that is missing, or that belongs to another model.
    """

    def __init__(self, path: Path) -> None:
        paths = part_paths(path)
        missing = [part.name for part in paths if not part.is_file()]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise IntegrityError(
                f"missing of {len(paths)} parts: {', '.join(missing[:5])}{more}",
                where=path.parent,
                hint="fetch them again; all parts lie in one directory",
            )
        self.path = path
        self._files = [GGUFFile(part) for part in paths]
        self._check_counts()
        self.metadata = self._files[0].metadata

    @cached_property
    def places(self) -> Mapping[str, GGUFFile]:
        return {name: file for file in self._files for name in file.infos}

    def header(self) -> Header:
        """What a family reads its spec from."""
        architecture = self.metadata.get("general.architecture")
        blocks = self.metadata.get(f"{architecture}.block_count")
        if isinstance(blocks, int) and blocks > len(self.places):
            raise self._wrong(f"claims {blocks} layers with {len(self.places)} tensors")
        shapes = _Shapes((name, file.infos[name].shape) for name, file in self.places.items())
        return Header(metadata=self.metadata, shapes=shapes, rope_divisors=self._rope_divisors())

    def _check_counts(self) -> None:
        for number, file in enumerate(self._files):
            stated = file.metadata.get("split.no", 0), file.metadata.get("split.count", 1) or 1
            if stated != (number, len(self._files)):
                raise IntegrityError(
                    f"is number {stated[0]!r:.20} of {stated[1]!r:.20} parts, counted from 0",
                    where=file.path,
                    hint="parts keep the names they were made with: NAME-00001-of-0000N.gguf",
                )
        held = sum(len(file.infos) for file in self._files)
        stated = self._files[0].metadata.get("split.tensors.count", held)
        if not held == stated == len(self.places):
            raise self._wrong(
                f"its parts hold {held} tensors, {len(self.places)} by name, of {stated!r:.20}"
            )

    def _rope_divisors(self) -> tuple[float, ...] | None:
        if ROPE_FREQS not in self.places:
            return None
        tensor = self.places[ROPE_FREQS].tensor(ROPE_FREQS)
        if tensor.scheme.name != "f32" or len(tensor.shape) != 1:
            raise self._wrong(f"{ROPE_FREQS} is not a vector of f32")
        values = [float(value) for value in tensor.data.view("<f4")[0]]
        if not all(value > 0 for value in values):
            raise self._wrong(f"{ROPE_FREQS} holds a divisor that is not above 0")
        return tuple(inf if value >= STORED_INFINITY else value for value in values)

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(what, where=self.path)


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; asking for a tensor that is not there says so."""

    def __missing__(self, name: str) -> Any:
        raise IntegrityError(f"the tensor '{name}' is missing")
