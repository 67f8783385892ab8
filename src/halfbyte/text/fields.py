"""Typed reads from untrusted mappings: a wrong type or range is an IntegrityError naming the key.

A missing key and null both give None; nothing is converted. Used for GGUF metadata and for the
JSON files beside a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from halfbyte.errors import IntegrityError

Item = TypeVar("Item", str, int, float)


def text(values: Mapping[str, Any], key: str) -> str | None:
    """A string."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong(key, value, "a string")
    return value


def flag(values: Mapping[str, Any], key: str) -> bool | None:
    """True or false."""
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong(key, value, "true or false")
    return value


def number(values: Mapping[str, Any], key: str, low: float, high: float) -> float | None:
    """A finite number in [low, high]."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong(key, value, "a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise wrong(key, value, f"a number in [{low}, {high}]")
    return value


def token_id(values: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    """An id in [0, vocab_size)."""
    value = values.get(key)
    return None if value is None else _id(key, value, vocab_size)


def token_ids(values: Mapping[str, Any], key: str, vocab_size: int) -> list[int]:
    """One id or a list of ids, each in [0, vocab_size); empty when absent."""
    value = values.get(key)
    if value is None:
        return []
    ids = cast("list[Any]", value) if isinstance(value, list) else [value]
    return [_id(key, item, vocab_size) for item in ids]


def items(values: Mapping[str, Any], key: str, kind: type[Item], limit: int) -> list[Item] | None:
    """A list of at most `limit` values of one type."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list | tuple):
        raise wrong(key, value, "a list")
    found = cast("list[Any]", value)
    if len(found) > limit:
        raise wrong(key, f"a list of {len(found)}", f"at most {limit} long")
    if not {type(item) for item in found} <= {kind}:
        raise wrong(key, found, f"a list of {kind.__name__}")
    return list(found)


def wrong(key: str, value: Any, wanted: str) -> IntegrityError:
    """The error for a field that is not what it must be."""
    return IntegrityError(f"the field '{key}' is {repr(value)[:60]}; it must be {wanted}")


def _id(key: str, value: Any, vocab_size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise wrong(key, value, f"a token id below {vocab_size}")
    return value
