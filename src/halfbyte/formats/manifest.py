"""The manifest beside an artefact: what it holds, where it came from, how it was made.

`X.gguf` has `X.gguf.manifest.json` beside it, a directory has `manifest.json` in it. Two checks
come with it: a cheap one for every load (sizes, and the hash of each header), and a complete one
that hashes everything. It detects damage and mix-ups; it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from halfbyte import __version__
from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.formats.atomic import write_file
from halfbyte.formats.documents import read_json
from halfbyte.formats.gguf import GGUFFile
from halfbyte.formats.gguf_parts import part_paths
from halfbyte.formats.progress import Progress
from halfbyte.formats.safetensors import SafetensorsFile

SCHEMA = "halfbyte.manifest/1"
NAME = "manifest.json"
CONFIG = "config.json"
MEASUREMENTS = "measurements"
EXPORT = "export"  # the method that changes nothing
SOURCE_MANIFEST = "source_manifest"  # of an export: what the manifest of its source says
CHUNK = 1 << 22
SMALL = 1 << 27
HEADERS = {".gguf": GGUFFile, ".safetensors": SafetensorsFile}


def write_manifest(
    artefact: Path,
    *,
    source: Path,
    recipe: str,
    method: str,
    details: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Hash an artefact (a file or a directory) and its source, and write the manifest; returns
    where. `details`: what else there is to say of how it was made."""
    files = _files(artefact)
    total = sum(file.stat().st_size for file in [*files, *_files(source)])
    hashed = _Hashing(total, progress)
    document = {
        "schema": SCHEMA,
        "halfbyte": __version__,
        "recipe": recipe,
        "method": method,
        **(details or {}),
        "source": {"name": source.resolve().name, "files": hashed.listed(_files(source))},
        "files": hashed.listed(files),
    }
    path = _place(artefact)
    _write(path, document)
    return path


def described(artefact: Path) -> dict[str, Any]:
    """What the manifest of an artefact says; nothing where there is none."""
    place = _place(artefact)
    return read_json(place) if place.exists() else {}


def record(artefact: Path, measurements: Mapping[str, Any]) -> None:
    """Keep what was measured of an artefact in its manifest, in place of what was there before."""
    _write(_place(artefact), {**described(artefact), MEASUREMENTS: measurements})


def ungated(artefact: Path) -> str | None:
    """Why nobody should rely on an artefact yet, in a line; None for what is not ours to say.

    That is: a file without a manifest, one that holds its source as it was, and one that passed.
    An export that was not measured itself is what its source is.
    """
    facts = described(artefact)
    while facts.get("method") == EXPORT and MEASUREMENTS not in facts:
        found = facts.get(SOURCE_MANIFEST)
        facts = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if not facts:
        return None
    measurements = facts.get(MEASUREMENTS)
    gate = measurements.get("gate") if isinstance(measurements, dict) else None
    if not isinstance(gate, dict):
        return (
            "never measured against its original: halfbyte eval --against ORIGINAL --gate default"
        )
    return None if gate.get("passed") is True else "it missed its gate, as its manifest says"


def identity(source: Path) -> dict[str, Any]:
    """What a checkpoint is, cheaply: its name, and per file its size and the hash of what is small.

    Of .gguf and .safetensors files that is the header. Where it lay is nobody else's business.
    """
    facts: dict[str, Any] = {}
    for file in _files(source):
        facts[file.name] = _facts(file)
        if "header_sha256" not in facts[file.name] and file.stat().st_size <= SMALL:
            facts[file.name]["sha256"] = _Hashing(0, None).sha256(file)
    return {"name": source.resolve().name, "files": facts}


def weights_hash(source: Path, progress: Progress | None = None) -> str:
    """A hash of all that a checkpoint computes with: its weights and its config. Reads them all."""
    files = [file for file in _files(source) if file.suffix in HEADERS or file.name == CONFIG]
    hashed = _Hashing(sum(file.stat().st_size for file in files), progress)
    facts = [[file.name, hashed.sha256(file)] for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def hashes(checkpoint: Path, progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 by file name: as a manifest has them, or hashed now where there is none."""
    listed = described(checkpoint).get("files")
    if isinstance(listed, dict):
        return {name: str(facts.get("sha256", "")) for name, facts in listed.items()}
    files = _files(checkpoint)
    hashed = _Hashing(sum(file.stat().st_size for file in files), progress)
    return {file.name: hashed.sha256(file) for file in files}


def check_sizes(artefact: Path) -> bool:
    """The check at load: sizes and header hashes. False when there is no manifest.

    Raises `IntegrityError` naming the file, what was expected and what was found.
    """
    if not _place(artefact).exists():
        return False
    for file, expected in _listed(artefact):
        _compare(file, "bytes", expected.get("bytes"), file.stat().st_size)
        length = expected.get("header_bytes")
        if isinstance(length, int) and 0 < length <= SMALL:
            _compare(file, "header_sha256", expected.get("header_sha256"), _head(file, length))
    return True


def verify(artefact: Path, progress: Progress | None = None) -> int:
    """Hash every file of the manifest; returns how many. Raises like `check_sizes`."""
    if not check_sizes(artefact):
        raise InvalidInputError(
            f"there is no manifest {_place(artefact).name}",
            where=artefact,
            hint="quantize writes one; a hub download is checked against the hub",
        )
    listed = list(_listed(artefact))
    hashed = _Hashing(sum(file.stat().st_size for file, _ in listed), progress)
    for file, expected in listed:
        _compare(file, "sha256", expected.get("sha256"), hashed.sha256(file))
    return len(listed)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    data = (json.dumps(document, indent=2) + "\n").encode()
    write_file(path, data)


def _place(artefact: Path) -> Path:
    """Where the manifest of a directory or of a file is; a file's may be its directory's."""
    if artefact.is_dir():
        return artefact / NAME
    own, shared = artefact.with_name(f"{artefact.name}.{NAME}"), artefact.parent / NAME
    return own if own.exists() or not _lists(shared, artefact.name) else shared


def _lists(place: Path, name: str) -> bool:
    """Whether there is a manifest of ours that has a file of this name."""
    try:
        document = read_json(place)
    except IntegrityError:
        return False
    return document.get("schema") == SCHEMA and name in document.get("files", {})


def _files(artefact: Path) -> list[Path]:
    if artefact.is_file():
        return part_paths(artefact)
    return sorted(
        file
        for file in artefact.iterdir()
        if file.is_file() and file.name != NAME and not file.name.startswith(".")
    )


def _facts(file: Path) -> dict[str, Any]:
    """Size, and for a checkpoint the hash of its header."""
    size = file.stat().st_size
    if file.suffix not in HEADERS:
        return {"bytes": size}
    length = HEADERS[file.suffix](file).header_bytes
    return {"bytes": size, "header_bytes": length, "header_sha256": _head(file, length)}


def _head(file: Path, length: int) -> str:
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(length)).hexdigest()


def _listed(artefact: Path) -> Iterable[tuple[Path, Mapping[str, Any]]]:
    """The files of the manifest, each with what is written of it."""
    place = _place(artefact)
    files = read_json(place).get("files")
    if not isinstance(files, dict) or not files:
        raise IntegrityError("lists no files", where=place)
    for name, expected in files.items():
        if Path(name).name != name or not isinstance(expected, dict):
            raise IntegrityError(f"a malformed entry '{name[:80]}'", where=place)
        if not (place.parent / name).is_file():
            raise IntegrityError(f"{name} is missing", where=place.parent)
        yield place.parent / name, expected


def _compare(file: Path, what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise IntegrityError(
            f"{what}: the manifest says {expected}, found {found}",
            where=file,
            hint="the file was altered or damaged; make or fetch it again",
        )


class _Hashing:
    """SHA-256 of several files with one count of the bytes done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def listed(self, files: Iterable[Path]) -> dict[str, Any]:
        """Of each file, by its name, what a manifest says."""
        return {file.name: {**_facts(file), "sha256": self.sha256(file)} for file in files}

    def sha256(self, file: Path) -> str:
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                self._done += len(chunk)
                if self._progress is not None:
                    self._progress(self._done, self._total)
        return digest.hexdigest()
