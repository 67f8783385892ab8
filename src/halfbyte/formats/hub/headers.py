"""A model on a hub before its download: every file at its size, with nothing in it but headers.

`read` takes such an outline for the checkpoint itself, so that what a model is, and what each of
its tensors takes, is known from some kilobytes. The configuration is fetched whole and checked by
its hash; of weights only ranges, which no hash covers: the download checks them. Where weights
should be there are holes, which take no space. Kept by commit in the cache folder.

What it is not: a model. Its tensors are zeros; nothing is ever run from it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

from halfbyte import env
from halfbyte.errors import IntegrityError
from halfbyte.formats.atomic import write_errors
from halfbyte.formats.gguf import CutShortError, GGUFHeader, header_of
from halfbyte.formats.gguf_parts import ROPE_FREQS
from halfbyte.formats.hub.client import Client
from halfbyte.formats.hub.listing import RemoteFile
from halfbyte.formats.safetensors import INDEX, LARGEST_HEADER

CONFIG = "config.json"
WHOLE = (CONFIG, INDEX)
FIRST = 1 << 18
LARGEST = 1 << 28  # of a GGUF's header

Ask = Callable[[int, int], bytes]
"""From a start to a stop: those bytes of the file."""


def outline_folder(repo: str, commit: str) -> Path:
    """Where the outline of a repository at a commit is kept."""
    return env.cache_dir() / "outlines" / repo.replace("/", "--") / commit


def outline(client: Client, repo: str, file: RemoteFile, folder: Path) -> None:
    """Make one file of an outline, unless it is there: its size, and its header if it has one."""
    place = folder / file.name
    if place.is_file() and place.stat().st_size == file.size:
        return
    ask = partial(client.part, file.url, repo=repo)
    pieces: dict[int, bytes] = {}
    if file.name.endswith(".safetensors"):
        pieces = {0: _safetensors(ask, file)}
    elif file.name.endswith(".gguf"):
        pieces = _gguf(ask, file)
    part = place.with_name(f"{place.name}.part")
    with write_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            stream.truncate(file.size)
            for start, data in pieces.items():
                stream.seek(start)
                stream.write(data)
        part.replace(place)


def _safetensors(ask: Ask, file: RemoteFile) -> bytes:
    """The length of the JSON, and the JSON."""
    data = ask(0, min(FIRST, file.size))
    if len(data) < 8:
        raise IntegrityError("is no safetensors file", where=file.name)
    stop = 8 + struct.unpack_from("<Q", data)[0]
    if stop - 8 > LARGEST_HEADER or stop > file.size:
        raise IntegrityError(f"its header claims {stop - 8} bytes", where=file.name)
    return data[:stop] if stop <= len(data) else data + ask(len(data), stop)


def _gguf(ask: Ask, file: RemoteFile) -> dict[int, bytes]:
    """The header, as much of the file as it turns out to be, and the divisors of rotations."""
    data = b""
    while True:
        stop = min(max(FIRST, 4 * len(data)), file.size)
        data += ask(len(data), stop)
        try:
            header = header_of(data, Path(file.name))
            break
        except CutShortError as cut:
            if len(data) < stop or stop == file.size or max(cut.needed, stop) > LARGEST:
                raise
    return {0: data[: header.nbytes], **_divisors(ask, header)}


def _divisors(ask: Ask, header: GGUFHeader) -> dict[int, bytes]:
    """The one tensor that says what a model is."""
    if ROPE_FREQS not in header.declared:
        return {}
    scheme, shape, offset = header.declared[ROPE_FREQS]
    start = header.nbytes + offset
    return {start: ask(start, start + scheme.bytes(shape))}
