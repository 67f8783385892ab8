"""Writing GGUF files: version 3, alignment 32, a tensor at a time, whole or not at all.

The type of a metadata value follows from its Python type, as llama.cpp expects it: bool; uint32 for
whole numbers, int32 below zero (64 bits where they are too large); float32; string; and arrays of
bool, int32, float32 or string. An empty list is left out, as gguf-py does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.gguf import (
    ALIGNMENT,
    ARRAY,
    BOOL,
    FLOAT32,
    INT32,
    INT64,
    LONGEST_NAME,
    MAGIC,
    NUMBERS,
    STRING,
    UINT32,
    UINT64,
)
from halfbyte.formats.progress import Progress
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import Scheme

VERSION = 3


def write(
    path: Path,
    *,
    metadata: Mapping[str, Any],
    layout: Mapping[str, tuple[Scheme, tuple[int, ...]]],
    tensors: Iterable[tuple[str, QTensor]],
    progress: Progress | None = None,
) -> None:
    """Write `path`. `layout` says what `tensors` will give, in that order: name -> scheme, shape.

    Raises `DoesNotFitError` or `InvalidInputError` when the disk or the target refuse.
    """
    head = _head(metadata, layout)
    total = sum(_padded(scheme.bytes(shape)) for scheme, shape in layout.values())
    done = 0
    with atomic_file(path, size=len(head) + total) as file:
        file.write(head)
        for (name, (scheme, shape)), (given, tensor) in zip(layout.items(), tensors, strict=True):
            assert (name, scheme, shape) == (given, tensor.scheme, tensor.shape), (name, given)
            file.write(tensor.data.data)
            file.write(bytes(-tensor.nbytes % ALIGNMENT))
            done += _padded(tensor.nbytes)
            if progress is not None:
                progress(done, total)


def _head(
    metadata: Mapping[str, Any], layout: Mapping[str, tuple[Scheme, tuple[int, ...]]]
) -> bytes:
    """Everything before the data, padded to the alignment."""
    stored = {key: value for key, value in metadata.items() if not _is_list(value) or value}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(layout), len(stored))]
    parts += (_string(key) + _typed(key, value) for key, value in stored.items())
    offset = 0
    for name, (scheme, shape) in layout.items():
        parts.append(_info(name, scheme, shape, offset))
        offset += _padded(scheme.bytes(shape))
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _info(name: str, scheme: Scheme, shape: tuple[int, ...], offset: int) -> bytes:
    assert len(name.encode()) < LONGEST_NAME, name
    if scheme.ggml_type is None:
        raise UnsupportedError(f"GGUF has no type for {scheme.name}", where=name)
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _string(name) + dims + struct.pack("<IQ", scheme.ggml_type, offset)


def _typed(key: str, value: Any) -> bytes:
    """The value type and the value."""
    if _is_list(value):
        return struct.pack("<I", ARRAY) + _array(key, value)
    kind = _kind(key, value)
    if kind == INT32:
        kind = _whole(value)
    return struct.pack("<I", kind) + _plain(kind, value)


def _whole(value: int) -> int:
    """The type of a single whole number."""
    if value < 0:
        return INT32 if value >= -(2**31) else INT64
    return UINT32 if value < 2**32 else UINT64


def _array(key: str, values: Sequence[Any]) -> bytes:
    kinds = {_kind(key, value) for value in values}
    if len(kinds) > 1:
        raise InvalidInputError("a list of mixed types in GGUF metadata", where=key)
    kind = kinds.pop()
    head = struct.pack("<IQ", kind, len(values))
    if kind == STRING:
        return head + b"".join(_string(value) for value in values)
    try:
        return head + np.array(values, dtype=NUMBERS[kind][1]).tobytes()
    except OverflowError as error:
        raise InvalidInputError("a number beyond 32 bits in a list", where=key) from error


def _kind(key: str, value: Any) -> int:
    """The narrowest type: whole numbers count as int32 here."""
    for python, kind in ((bool, BOOL), (int, INT32), (float, FLOAT32), (str, STRING)):
        if isinstance(value, python):
            return kind
    raise InvalidInputError(f"GGUF metadata cannot hold a {type(value).__name__}", where=key)


def _plain(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack(NUMBERS[kind][0], value)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
