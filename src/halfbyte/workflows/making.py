"""Making an artefact: quantize a checkpoint, or write it as it is, with a manifest beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Source, read, write_gguf
from halfbyte.formats.manifest import check_sizes, write_manifest
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import Method, recipe_of

MODEL_NAME = "model.gguf"
EXPORTED = "as stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """What was written: the GGUF, its manifest, and sizes in bytes."""

    path: Path
    manifest: Path
    bytes: int
    source_bytes: int


def quantize(
    model: str,
    target: Path,
    *,
    recipe: str = "q4_0",
    method: Method = "search",
    progress: Progress | None = None,
) -> Artefact:
    """Quantize a checkpoint to a GGUF with its manifest.

    `target`: a .gguf file, or a directory (made if need be) that gets model.gguf. Memory: the
    largest tensor, not the model.
    """
    place = locate(model, progress)
    check_sizes(place)
    quantized = Quantized(read(place), recipe_of(recipe), method=method)
    return _write(quantized, place, target, recipe=recipe, method=method, progress=progress)


def export_gguf(model: str, target: Path, *, progress: Progress | None = None) -> Artefact:
    """Write a model as a GGUF, its tensors exactly as they are stored."""
    place = locate(model, progress)
    check_sizes(place)
    return _write(read(place), place, target, recipe=EXPORTED, method="export", progress=progress)


def _write(
    source: Source,
    place: Path,
    target: Path,
    *,
    recipe: str,
    method: str,
    progress: Progress | None,
) -> Artefact:
    path = _gguf_path(target)
    if path.exists() and path.samefile(place):
        raise InvalidInputError("the model itself is there; choose another -o", where=path)
    named = {"general.name": place.resolve().stem if place.is_file() else place.resolve().name}
    write_gguf(source, path, extra_metadata=named, progress=progress)
    artefact = path if target.suffix == ".gguf" else target
    manifest = write_manifest(artefact, source=place, recipe=recipe, method=method)
    return Artefact(
        path=path, manifest=manifest, bytes=path.stat().st_size, source_bytes=_size(place)
    )


def _gguf_path(target: Path) -> Path:
    if target.suffix == ".gguf":
        return target
    if target.is_file():
        raise InvalidInputError("is a file", where=target, hint="-o takes X.gguf, or a directory")
    target.mkdir(parents=True, exist_ok=True)
    return target / MODEL_NAME


def _size(place: Path) -> int:
    if place.is_file():
        return place.stat().st_size
    return sum(file.stat().st_size for file in place.glob("*") if file.is_file())
