"""Safetensors files: a JSON header with the place of each tensor, then the bytes.

Read without torch: tensors become `QTensor` views of the mapped file, in scheme f32, f16 or bf16.
Whole numbers of 64 bits become f32, which must hold them.
The header is untrusted: it is at most 100 MB, and its tensors fill the data without gaps, overlaps
or anything beyond the end. A directory holds one `model.safetensors`, or shards and the
`model.safetensors.index.json` that assigns tensors to them.

Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.formats.atomic import atomic_file
from halfbyte.formats.documents import parse_json, read_json
from halfbyte.formats.mapping import MappedFile
from halfbyte.formats.progress import Progress
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Scheme

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
INTEGERS = "I64"
NUMBERS = {
    **{"F32": "<f4", "F16": "<f2", "BF16": "<u2"},
    **{"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One entry of the header; bytes `[start, stop)` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def scheme(self) -> Scheme:
        """`UnsupportedError` for a type that is no float of 16 or 32 bits."""
        if self.dtype == INTEGERS:
            return SCHEMES["f32"]
        if self.dtype not in DTYPES:
            raise UnsupportedError(
                f"stored as {self.dtype}", where=self.name, hint=f"readable: {', '.join(DTYPES)}"
            )
        return SCHEMES[DTYPES[self.dtype]]


class SafetensorsFile:
    """One mapped file: `infos` by tensor name, in the order of the data."""

    def __init__(self, path: Path) -> None:
        self._map = MappedFile(path)
        self.path = path
        self.header_bytes = self._header_bytes()
        self.infos = self._parse()

    def tensor(self, name: str) -> QTensor:
        """A view of the file, unless whole numbers have to be converted."""
        info = self.infos[name]
        data = self._map.view(info.start, info.stop)
        if info.dtype == INTEGERS:
            data = self._as_f32(name, data.view("<i8"))
        rows = prod(info.shape[:-1])
        return QTensor(scheme=info.scheme, shape=info.shape, data=data.reshape(rows, -1))

    def array(self, name: str) -> np.ndarray:
        """A view of the file as numbers; bf16 as its bits. `UnsupportedError` for other types."""
        info = self.infos[name]
        if info.dtype not in NUMBERS:
            raise UnsupportedError(f"stored as {info.dtype}", where=name)
        return self._map.view(info.start, info.stop).view(NUMBERS[info.dtype]).reshape(info.shape)

    def release(self, name: str) -> None:
        """Give back the pages of a tensor that was consumed."""
        self._map.release(self.infos[name].start, self.infos[name].stop)

    def _as_f32(self, name: str, numbers: np.ndarray) -> np.ndarray:
        floats = numbers.astype("<f4")
        if (floats.astype("<i8") != numbers).any():
            raise self._wrong(f"tensor '{name}' holds whole numbers too large for f32")
        return floats.view(np.uint8)

    def _header_bytes(self) -> int:
        """Bytes before the data: the length field and the JSON."""
        size = self._map.size
        needed = 8 + (struct.unpack_from("<Q", self._map.buffer)[0] if size >= 8 else 2)
        if needed - 8 > LARGEST_HEADER:
            raise self._wrong(f"its header claims {needed - 8} bytes; not a safetensors file")
        if needed > size:
            raise self._wrong(f"the file has {size} bytes and its header ends at {needed}")
        return needed

    def _parse(self) -> dict[str, TensorInfo]:
        document = parse_json(self._map.buffer[8 : self.header_bytes], where=self.path)
        metadata = document.pop("__metadata__", {})
        if not isinstance(metadata, dict):
            raise self._wrong("the header's __metadata__ is not a table")
        infos = [self._info(name, entry) for name, entry in document.items()]
        infos.sort(key=lambda info: (info.start, info.stop))
        position = self.header_bytes
        for info in infos:
            if info.start != position:
                kind = "overlaps" if info.start < position else "leaves a gap after"
                raise self._wrong(f"tensor '{info.name}' {kind} the one before")
            position = info.stop
        if position != self._map.size:
            raise self._wrong(f"the file has {self._map.size} bytes; its tensors end at {position}")
        return {info.name: info for info in infos}

    def _info(self, name: str, entry: Any) -> TensorInfo:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self._wrong(f"tensor '{name[:80]}' needs dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise UnsupportedError(
                f"tensor '{name[:80]}' has unknown type {dtype!r:.40}", where=self.path
            )
        if not _sizes(shape) or prod(shape) >= 2**63 or not _sizes(offsets) or len(offsets) != 2:
            raise self._wrong(f"tensor '{name[:80]}' has a malformed shape or offsets")
        if 8 * (offsets[1] - offsets[0]) != prod(shape) * BITS[dtype]:
            raise self._wrong(f"tensor '{name[:80]}': {dtype} {shape} does not fill {offsets}")
        start, stop = (self.header_bytes + offset for offset in offsets)
        return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), start=start, stop=stop)

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(what, where=self.path)


def _sizes(value: Any) -> bool:
    """A short list of whole numbers that are no absurd sizes."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 2**48 for item in value)
    )


def open_directory(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it, for the checkpoint in a directory.

    Raises `IntegrityError` for a missing shard, or where the index and the files disagree, and
    `UnsupportedError` where there are only pickles.
    """
    if (path / SINGLE).exists():
        file = SafetensorsFile(path / SINGLE)
        return dict.fromkeys(file.infos, file)
    if (path / INDEX).exists():
        return _open_shards(path)
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise UnsupportedError(
            "only pickled weights, which can run code when opened",
            where=path,
            hint="convert them to safetensors where that is safe, or take another upload",
        )
    raise IntegrityError(f"has neither {SINGLE} nor {INDEX}", where=path)


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    index = directory / INDEX
    assigned = read_json(index).get("weight_map")
    if not isinstance(assigned, dict) or not all(isinstance(f, str) for f in assigned.values()):
        raise IntegrityError("has no weight_map of tensor -> file", where=index)
    assigned = cast("dict[str, str]", assigned)
    shards = {name: _open_shard(directory, name) for name in sorted(set(assigned.values()))}
    held = {tensor: name for name, shard in shards.items() for tensor in shard.infos}
    if held != assigned or len(held) != sum(len(shard.infos) for shard in shards.values()):
        wrong = sorted(
            tensor for tensor in held | assigned if held.get(tensor) != assigned.get(tensor)
        )
        shown = ", ".join(wrong[:5]) or "a tensor is in two files"
        raise IntegrityError(f"disagrees with the files about: {shown}", where=index)
    return {tensor: shards[name] for tensor, name in held.items()}


def _open_shard(directory: Path, name: str) -> SafetensorsFile:
    if PurePosixPath(name).name != name or not name.endswith(".safetensors") or "\\" in name:
        raise IntegrityError(f"names a file outside: '{name[:80]}'", where=directory / INDEX)
    if not (directory / name).is_file():
        raise IntegrityError(
            f"the shard {name} is missing", where=directory, hint="download it again"
        )
    return SafetensorsFile(directory / name)


def write(
    path: Path,
    *,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[tuple[str, np.ndarray]],
    progress: Progress | None = None,
) -> None:
    """Write one file, a tensor at a time, whole or not at all.

    `layout` says what `tensors` will give, in that order: name -> (type as in the header, shape);
    the bytes may come in any shape.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + bytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with atomic_file(path, size=8 + len(text) + end) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, (dtype, shape)), (given, data) in zip(layout.items(), tensors, strict=True):
            size = bytes_of(dtype, shape)
            assert (name, size) == (given, data.nbytes), (name, given, size, data.nbytes)
            file.write(np.ascontiguousarray(data).data)
            done += size
            if progress is not None:
                progress(done, end)


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type."""
    return prod(shape) * BITS[dtype] // 8


def dtype_of(scheme: Scheme) -> str:
    """What a header calls f32, f16 or bf16; other schemes are an `UnsupportedError`."""
    for dtype, name in DTYPES.items():
        if name == scheme.name:
            return dtype
    raise UnsupportedError(f"scheme {scheme.name} in a safetensors file", hint="write a GGUF")
