"""JSON and texts from strangers: read with errors a person can use, JSON with a size limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from halfbyte.errors import IntegrityError, InvalidInputError

LARGEST_FILE = 100_000_000


def content_of(path: Path) -> str:
    """What a UTF-8 file says."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"not UTF-8 text: {error}", where=path) from error
    except OSError as error:
        raise InvalidInputError(error.strerror or str(error), where=path) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Missing, too large or malformed is an `IntegrityError`."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise IntegrityError(f"over {LARGEST_FILE} bytes of JSON", where=path)
        data = path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"cannot be read: {error.strerror}", where=path) from error
    return parse_json(data, where=path)


def parse_json(data: bytes, *, where: Path) -> dict[str, Any]:
    """A JSON object without repeated keys; anything else is an `IntegrityError`."""
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not valid JSON: {error}", where=where) from error
    if not isinstance(document, dict):
        raise IntegrityError("not a JSON object", where=where)
    return cast("dict[str, Any]", document)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{repeated[:80]}' is repeated")
    return table
