"""The chains: quantize and keep the proof of it, measure against a reference, export.

Each takes values and paths, calls the rooms downstairs in order, and returns what was found; what
is shown of it is the command line's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals import diagnose
from halfbyte.evals.fidelity import Fidelity, measure
from halfbyte.evals.gate import default_gate
from halfbyte.evals.texts import Protocol, read_text
from halfbyte.formats.checkpoint import Source, read, write_gguf
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.manifest import check_sizes, write_manifest
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose
from halfbyte.models.load import load
from halfbyte.quantizer.opening import open_source
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import LoadOptions, Method, recipe_of
from halfbyte.text.tokenizer import Tokenizer

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


def evaluate(
    model: str,
    texts: Sequence[Path],
    *,
    options: LoadOptions,
    lora: str | None = None,
    against: str | None = None,
    protocol: Protocol = "llama.cpp",
    window: int = 512,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """Measure a model on texts, alone or against a reference. `lora`: the model with that adapter.

    The reference runs on the same device with f32 activations, as it is stored, and its tokenizer
    is used for both. Raises `InvalidInputError` where the texts or the two models do not fit.
    """
    source = open_source(model, recipe=options.recipe, method=options.method, progress=progress)
    base = source if against is None else open_source(against, progress=progress)
    assets = base.assets or source.assets
    if assets is None:
        raise InvalidInputError("neither model has a tokenizer", where=model)
    tokenizer = Tokenizer(assets)
    adapters = {} if lora is None else {lora: open_adapter(lora, source.spec)}
    ops = choose(
        source.spec,
        options.device,
        options.dtype,
        threads=options.threads,
        adapters=bool(adapters),
    )
    decoder = load(source, ops, adapters=adapters)
    reference = (
        None
        if against is None
        else load(base, choose(base.spec, options.device, "f32", threads=options.threads))
    )
    return [
        measure(
            decoder,
            read_text(path, tokenizer),
            reference=reference,
            protocol=protocol,
            window=window,
            max_windows=max_windows,
            kv=options.kv,
            progress=progress,
        )
        for path in texts
    ]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside its reference, as `evaluate` opens them."""

    source: Source
    base: Source

    def gate(self) -> dict[str, float]:
        """Thresholds for how the model is stored."""
        return default_gate(self.source.spec, self.source.schemes)

    def differences(self) -> list[str]:
        """What the two say of themselves that should be the same."""
        return diagnose.differences(self.source, self.base)

    def likely_causes(self, measured: Sequence[Fidelity]) -> list[str]:
        """Why the model missed its gate, likeliest first; the weights are read again."""
        return diagnose.likely_causes(self.source, self.base, measured)


def compare(model: str, against: str, *, options: LoadOptions) -> Comparison:
    """Open a model and its reference to be compared; headers only."""
    source = open_source(model, recipe=options.recipe, method=options.method)
    return Comparison(source, open_source(against))
