"""What a chain leaves on the disk: a model in a file or a directory, and its manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.formats.checkpoint import Source, write_gguf
from halfbyte.formats.directory import held_exactly, write_directory
from halfbyte.formats.manifest import write_manifest
from halfbyte.formats.progress import Progress
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import ModelSpec, Recipe, Scheme

MODEL_NAME = "model.gguf"
AS_STORED = "as stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What was written: the model, its manifest, and sizes in bytes; `details` as the manifest has
    them, `notes` for a person."""

    path: Path
    manifest: Path
    bytes: int
    source_bytes: int
    method: str
    details: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def write_model(source: Source, place: Path, target: Path, progress: Progress | None) -> Path:
    """Write a source that comes from `place`; returns where the model is.

    X.gguf, or model.gguf in a directory; what a GGUF has no types for becomes a directory of
    safetensors (compressed-tensors).
    """
    if _wants_directory(source.schemes, target):
        write_directory(held(source, held_exactly), place, target, progress=progress)
        return target
    path = _gguf_path(target)
    write_named(source, place, path, progress)
    return path


def check_storable(spec: ModelSpec, schemes: Mapping[str, Scheme], target: Path) -> None:
    """Raises what `write_model` would for schemes that `target` cannot hold, before the work."""
    if _wants_directory(schemes, target):
        for tensor in spec.tensors():
            held_exactly(tensor.name, tensor.shape, schemes[tensor.name])
        return
    lacking = sorted({s.name for s in schemes.values() if s.ggml_type is None})
    if lacking:
        raise UnsupportedError(
            f"a GGUF has no type for {', '.join(lacking)}",
            where=target,
            hint="name a directory, which becomes one of safetensors",
        )


def _wants_directory(schemes: Mapping[str, Scheme], target: Path) -> bool:
    """Whether some scheme has no type in a GGUF, and a GGUF was not asked for."""
    return target.suffix != ".gguf" and any(s.ggml_type is None for s in schemes.values())


def held(source: Source, holder: Callable[[str, tuple[int, ...], Scheme], Scheme]) -> Source:
    """The source in schemes that hold it exactly, which `holder` names by tensor."""
    rules = tuple(
        (tensor.name, holder(tensor.name, tensor.shape, source.schemes[tensor.name]).name)
        for tensor in source.spec.tensors()
    )
    return Quantized(source, Recipe(name=AS_STORED, rules=rules))


def write_named(source: Source, place: Path, path: Path, progress: Progress | None) -> None:
    """Write a GGUF that has the name of where it comes from."""
    if path.exists() and path.samefile(place):
        raise InvalidInputError("the model itself is there; choose another -o", where=path)
    write_gguf(source, path, extra_metadata={"general.name": name_of(place)}, progress=progress)


def finished(
    path: Path,
    place: Path,
    artefact: Path,
    *,
    recipe: str,
    method: str,
    details: Mapping[str, Any],
    notes: tuple[str, ...] = (),
) -> Artefact:
    """The manifest of `artefact`, which holds or is the model at `path`, made from `place`."""
    return Artefact(
        path=path,
        manifest=write_manifest(
            artefact, source=place, recipe=recipe, method=method, details=details
        ),
        bytes=size_of(path),
        source_bytes=size_of(place),
        method=method,
        details=details,
        notes=notes,
    )


def name_of(place: Path) -> str:
    return place.resolve().stem if place.is_file() else place.resolve().name


def size_of(place: Path) -> int:
    """Bytes of a file, or of the files in a directory."""
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.glob("*") if file.is_file())


def _gguf_path(target: Path) -> Path:
    if target.suffix == ".gguf":
        return target
    if target.is_file():
        raise InvalidInputError("is a file", where=target, hint="-o takes X.gguf, or a directory")
    target.mkdir(parents=True, exist_ok=True)
    return target / MODEL_NAME


def published(artefact: Artefact, fresh: Path, target: Path) -> Artefact:
    """Moves what was made into its place."""
    if fresh.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        moves = {file: target / file.name for file in fresh.iterdir()}
    else:
        moves = {file: target.with_name(file.name) for file in fresh.parent.glob(f"{fresh.name}*")}
    for old, new in moves.items():
        old.replace(new)
    where = target if fresh.is_dir() else target.parent
    root = fresh if fresh.is_dir() else fresh.parent
    return replace(
        artefact,
        path=target if artefact.path == fresh else where / artefact.path.relative_to(root),
        manifest=where / artefact.manifest.relative_to(root),
    )
