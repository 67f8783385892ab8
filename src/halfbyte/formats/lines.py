"""JSON lines from strangers: one object per line, gzipped or not, each with where it stands."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.formats.documents import parse_json


@dataclass(frozen=True, slots=True)
class Line:
    """An object of a file, and `where` it stands: FILE:NUMBER."""

    where: Path
    fields: Mapping[str, Any]

    def wrong(self, what: str, hint: str | None = None) -> InvalidInputError:
        """The error for a line that is not what was asked for."""
        return InvalidInputError(what, where=self.where, hint=hint)

    def text(self, name: str) -> str:
        """A field that must be a text."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise self.wrong(f"has no text '{name}'")
        return value


def read_lines(path: Path, limit: int | None = None) -> list[Line]:
    """The objects of the first `limit` lines that are not empty; a file without one is an error."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            found = [_line(path, number, line) for number, line in islice(numbered, limit)]
    except (EOFError, gzip.BadGzipFile) as error:
        raise IntegrityError(str(error), where=path) from error
    except OSError as error:
        raise InvalidInputError(error.strerror or str(error), where=path) from error
    if not found:
        raise InvalidInputError("has no lines", where=path)
    return found


def _line(path: Path, number: int, data: bytes) -> Line:
    where = path.with_name(f"{path.name}:{number}")
    return Line(where, parse_json(data, where=where))
