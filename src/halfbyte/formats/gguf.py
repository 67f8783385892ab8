"""Reading GGUF files: metadata, the place of each tensor, and the tensors as views of the map.

Versions 2 and 3, little-endian, one file (gguf_parts.py has models of several). No torch. The
header is untrusted, and parsers of it have been attacked often: every count, length, dimension and
offset is checked against the file and against a cap before anything is allocated by it; repeated
keys and names are refused.

A 32-bit float of the metadata is given as the shortest decimal that rounds to it: 1e-05, not
9.999999747378752e-06; so a spec is the same from config.json and from the GGUF made of it. ggml
writes dimensions fastest first; our shapes are rows first.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.formats.mapping import MappedFile
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Scheme

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32

MOST_KEYS = 1 << 16
MOST_TENSORS = 1 << 20
MOST_ITEMS = 1 << 24  # of all arrays: a Python value is many times the byte it may come from
LONGEST_KEY = (1 << 16) - 1
LONGEST_NAME = 64
LONGEST_STRING = 1 << 24
LARGEST_ALIGNMENT = 1 << 20

# Value types: id -> (struct format, numpy type). Strings and arrays have none.
NUMBERS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<B", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64 = 4, 5, 6, 7, 8, 9, 10, 11

OF_GGML_TYPE = {
    scheme.ggml_type: scheme for scheme in SCHEMES.values() if scheme.ggml_type is not None
}
# ggml types we do not read, for the message.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor: bytes `[start, stop)` of the file."""

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """A mapped GGUF: `metadata` as plain Python values, `infos` by tensor name, in file order.

    `header_bytes` is where the tensor data begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = MappedFile(path)
        header = header_of(self._map.buffer, path)
        self.metadata, self.header_bytes = header.metadata, header.nbytes
        alignment = _alignment(self.metadata, path)
        self.infos = {
            name: self._placed(name, scheme, shape, offset, alignment)
            for name, (scheme, shape, offset) in header.declared.items()
        }
        self._refuse_overlaps()

    def tensor(self, name: str) -> QTensor:
        """A view of the file."""
        info = self.infos[name]
        data = self._map.view(info.start, info.stop).reshape(prod(info.shape[:-1]), -1)
        return QTensor(scheme=info.scheme, shape=info.shape, data=data)

    def release(self, name: str) -> None:
        """Give back the pages of a tensor that was consumed."""
        self._map.release(self.infos[name].start, self.infos[name].stop)

    def _placed(
        self, name: str, scheme: Scheme, shape: tuple[int, ...], offset: int, alignment: int
    ) -> TensorInfo:
        start = self.header_bytes + offset
        stop = start + scheme.bytes(shape)
        if offset % alignment:
            raise self._wrong(f"tensor '{name}' begins at {offset}, not aligned to {alignment}")
        if stop > self._map.size:
            raise IntegrityError(
                f"the file has {self._map.size} bytes and tensor '{name}' ends at {stop}",
                where=self.path,
                hint="the file is cut short or altered; fetch it again",
            )
        return TensorInfo(name=name, scheme=scheme, shape=shape, start=start, stop=stop)

    def _refuse_overlaps(self) -> None:
        placed = sorted(self.infos.values(), key=lambda info: info.start)
        for before, after in pairwise(placed):
            if after.start < before.stop:
                raise self._wrong(f"tensors '{before.name}' and '{after.name}' overlap")

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(what, where=self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFHeader:
    """What stands before the data, which begins at `nbytes`.

    `declared`: name -> scheme, shape, offset in the data, not yet checked against the file's size.
    """

    metadata: dict[str, Any]
    declared: dict[str, tuple[Scheme, tuple[int, ...], int]]
    nbytes: int


class CutShortError(IntegrityError):
    """The header goes on beyond what is there: to byte `needed` at least."""

    def __init__(self, size: int, needed: int, path: Path) -> None:
        super().__init__(
            f"the file has {size} bytes and its header needs at least {needed}",
            where=path,
            hint="the file is cut short or altered; fetch it again",
        )
        self.needed = needed


def header_of(buffer: bytes | mmap, path: Path) -> GGUFHeader:
    """The header at the beginning of `buffer`, of the file `path`."""
    cursor = _Cursor(buffer, path)
    num_tensors, num_keys = _counts(cursor)
    metadata = _metadata(cursor, num_keys)
    alignment = _alignment(metadata, path)
    declared = _declared(cursor, num_tensors)
    nbytes = -(-cursor.position // alignment) * alignment
    return GGUFHeader(metadata=metadata, declared=declared, nbytes=nbytes)


class _Cursor:
    """A position in the header; every read is checked against the end of the file."""

    def __init__(self, buffer: bytes | mmap, path: Path) -> None:
        self.buffer, self.size, self.path = buffer, len(buffer), path
        self.position = 0
        self.items_left = MOST_ITEMS

    def take(self, count: int) -> bytes:
        start = self.position
        if count > self.size - start:
            raise CutShortError(self.size, start + count, self.path)
        self.position = start + count
        return self.buffer[start : start + count]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, what: str, most: int) -> int:
        value = self.number("<Q")
        if value > most:
            raise self.wrong(f"{value} {what}; at most {most} are accepted")
        return value

    def string(self, what: str, longest: int) -> str:
        data = self.take(self.count(f"bytes of {what}", longest))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"a {what} is not UTF-8") from error

    def strings(self, count: int) -> list[str]:
        """An array of strings: the long part of a header, so it is walked in one tight loop."""
        buffer, position, size = self.buffer, self.position, self.size
        length_at = struct.Struct("<Q").unpack_from
        items: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(buffer, position)[0]
                if position - start > LONGEST_STRING:
                    raise self.wrong(f"a string of {position - start} bytes in an array")
                if position > size:
                    raise CutShortError(size, position, self.path)
                items.append(buffer[start:position].decode())
        except struct.error as error:
            raise CutShortError(size, position + 8, self.path) from error
        except UnicodeDecodeError as error:
            raise self.wrong(f"an array of strings is not UTF-8: {error}") from error
        self.position = position
        return items

    def wrong(self, what: str) -> IntegrityError:
        return IntegrityError(f"{what} (near byte {self.position})", where=self.path)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Magic and version; then how many tensors and how many keys."""
    if cursor.take(4) != MAGIC:
        raise IntegrityError("not a GGUF file", where=cursor.path)
    version = cursor.number("<I")
    if version & 0xFFFF == 0:
        raise UnsupportedError("a big-endian GGUF", where=cursor.path, hint="convert it again")
    if version not in VERSIONS:
        raise UnsupportedError(
            f"GGUF version {version}", where=cursor.path, hint="readable: version 2 and 3"
        )
    return cursor.count("tensors", MOST_TENSORS), cursor.count("keys", MOST_KEYS)


def _metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("key", LONGEST_KEY)
        if not key or key in metadata:
            raise cursor.wrong(f"the key '{key[:80]}' is empty or repeated")
        kind = cursor.number("<I")
        metadata[key] = _array(cursor, key) if kind == ARRAY else _value(cursor, key, kind)
    return metadata


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == STRING:
        return cursor.string("string", LONGEST_STRING)
    if kind not in NUMBERS:
        raise cursor.wrong(f"the key '{key[:80]}' has the unknown value type {kind}")
    value = cursor.number(NUMBERS[kind][0])
    if kind == BOOL and value > 1:
        raise cursor.wrong(f"the key '{key[:80]}' is neither true nor false")
    if kind == FLOAT32:
        return float(str(np.float32(value)))
    return bool(value) if kind == BOOL else value


def _array(cursor: _Cursor, key: str) -> list[Any]:
    kind = cursor.number("<I")
    count = cursor.count(f"items in '{key[:80]}'", cursor.items_left)
    cursor.items_left -= count
    if kind == STRING:
        return cursor.strings(count)
    if kind not in NUMBERS:
        raise cursor.wrong(f"the array '{key[:80]}' has the unknown item type {kind}")
    dtype = np.dtype(NUMBERS[kind][1])
    items = np.frombuffer(cursor.take(count * dtype.itemsize), dtype=dtype)
    return items.astype(bool).tolist() if kind == BOOL else items.tolist()


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if (
        type(alignment) is not int
        or not 0 < alignment <= LARGEST_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise IntegrityError(f"general.alignment is {alignment!r:.40}", where=path)
    return alignment


def _declared(cursor: _Cursor, num_tensors: int) -> dict[str, tuple[Scheme, tuple[int, ...], int]]:
    """Name -> scheme, shape, offset in the data; not yet checked against the file's size."""
    declared: dict[str, tuple[Scheme, tuple[int, ...], int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("tensor name", LONGEST_NAME)
        if not name or name in declared:
            raise cursor.wrong(f"the tensor name '{name}' is empty or repeated")
        num_dims = cursor.number("<I")
        if not 1 <= num_dims <= 4:
            raise cursor.wrong(f"tensor '{name}' has {num_dims} dimensions")
        dims = [cursor.number("<Q") for _ in range(num_dims)]
        if not all(dims) or prod(dims) >= 2**63:
            raise cursor.wrong(f"tensor '{name}' has the dimensions {dims}")
        shape = tuple(reversed(dims))
        declared[name] = _scheme(cursor, name, shape), shape, cursor.number("<Q")
    return declared


def _scheme(cursor: _Cursor, name: str, shape: tuple[int, ...]) -> Scheme:
    kind = cursor.number("<I")
    if kind not in OF_GGML_TYPE:
        raise UnsupportedError(
            f"tensor '{name}' is stored as ggml type {OTHER_TYPES.get(kind, kind)}",
            where=cursor.path,
            hint=f"readable: {', '.join(scheme.name for scheme in OF_GGML_TYPE.values())}",
        )
    scheme = OF_GGML_TYPE[kind]
    if shape[-1] % scheme.block:
        raise cursor.wrong(f"tensor '{name}': {shape[-1]} is no multiple of {scheme.block}")
    return scheme
