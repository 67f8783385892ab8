"""Writing a model in another program's form, its weights exactly as they are stored.

A tensor whose scheme the form lacks goes to one that holds the same values, integers under the same
scale; where there is none the export is refused, before a byte is written. Nothing is rounded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import UnsupportedError
from halfbyte.formats.atomic import atomic_directory
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.directory import held_exactly, write_directory
from halfbyte.formats.manifest import EXPORT, SOURCE_MANIFEST, check_sizes, described
from halfbyte.formats.ollama import NAME, modelfile
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.specs import SCHEMES, Scheme, lossless_target
from halfbyte.workflows.artefacts import (
    AS_STORED,
    MODEL_NAME,
    Artefact,
    finished,
    held,
    name_of,
    write_model,
    write_named,
)

Form = Literal["gguf", "compressed-tensors", "ollama", "lmstudio"]
PUBLISHER = "halfbyte"
IN_GGUF = [scheme for scheme in SCHEMES.values() if scheme.ggml_type is not None]
HUB_NAME = re.compile(r"([\w.-]+)/([\w.-]+)(?:[@:].*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """`model` as the caller says it, found at `place`; what is written goes to `target`."""

    model: str
    place: Path
    source: Source
    target: Path
    progress: Progress | None


def export(model: str, target: Path, form: Form, *, progress: Progress | None = None) -> Artefact:
    """Write `model` for another program.

    `gguf`: X.gguf, or a directory that gets model.gguf. `compressed-tensors`: a new directory for
    Transformers and vLLM. `ollama`: a new directory with model.gguf and a Modelfile. `lmstudio`:
    publisher/model/X.gguf within `target`, LM Studio's folder of models.
    Raises `UnsupportedError` for what the form cannot hold.
    """
    place = locate(model, progress)
    check_sizes(place)
    source = read(place)
    if source.spec.drafter is not None and source.spec.drafter.head_rows < source.spec.vocab:
        raise UnsupportedError(
            "a drafter whose head is a shortlist runs in halfbyte alone",
            where=place,
            hint="train one without --shortlist for other programs",
        )
    job = _Job(model=model, place=place, source=source, target=target, progress=progress)
    return FORMS[form](job)


def _to_gguf(job: _Job) -> Artefact:
    path = write_model(held(job.source, _in_gguf), job.place, job.target, job.progress)
    return _exported("gguf", job, path, path if job.target.suffix == ".gguf" else job.target)


def _to_compressed_tensors(job: _Job) -> Artefact:
    write_directory(held(job.source, held_exactly), job.place, job.target, progress=job.progress)
    return _exported("compressed-tensors", job, job.target, job.target)


def _to_ollama(job: _Job) -> Artefact:
    source = held(job.source, _in_gguf)
    made = modelfile(job.source.assets, MODEL_NAME)
    with atomic_directory(job.target, size=_bytes(source)) as part:
        write_named(source, job.place, part / MODEL_NAME, job.progress)
        (part / NAME).write_text(made.text, encoding="utf-8")
    called = name_of(job.place).lower()
    notes = (*made.notes, f"next: ollama create {called} -f {job.target / NAME}")
    return _exported("ollama", job, job.target / MODEL_NAME, job.target, notes)


def _to_lmstudio(job: _Job) -> Artefact:
    source = held(job.source, _in_gguf)
    on_hub = None if Path(job.model).exists() else HUB_NAME.fullmatch(job.model)
    publisher, name = on_hub.groups() if on_hub else (PUBLISHER, name_of(job.place))
    schemes = Counter(scheme.name for scheme in source.schemes.values() if scheme.block > 1)
    kind = schemes.most_common(1)[0][0] if schemes else source.schemes["embed.weight"].name
    path = job.target / publisher / name / f"{name}-{kind.upper()}.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_named(source, job.place, path, job.progress)
    return _exported("lmstudio", job, path, path)


FORMS: dict[Form, Callable[[_Job], Artefact]] = {
    "gguf": _to_gguf,
    "compressed-tensors": _to_compressed_tensors,
    "ollama": _to_ollama,
    "lmstudio": _to_lmstudio,
}


def _in_gguf(_name: str, _shape: tuple[int, ...], scheme: Scheme) -> Scheme:
    return lossless_target(scheme, IN_GGUF)


def _bytes(source: Source) -> int:
    return sum(source.schemes[t.name].bytes(t.shape) for t in source.spec.tensors())


def _exported(
    form: Form, job: _Job, path: Path, artefact: Path, notes: tuple[str, ...] = ()
) -> Artefact:
    """The manifest tells how the source was made and measured, where that is known."""
    history = {key: fact for key, fact in described(job.place).items() if key != "files"}
    details: dict[str, Any] = {"form": form}
    details |= {SOURCE_MANIFEST: history} if history else {}
    return finished(
        path, job.place, artefact, recipe=AS_STORED, method=EXPORT, details=details, notes=notes
    )
