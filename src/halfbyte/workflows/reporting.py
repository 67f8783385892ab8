"""The report of a model that was measured beside the one it was made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from statistics import fmean
from typing import Any

from halfbyte import __version__
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.evals.layers import LayerError, layer_errors
from halfbyte.evals.report import write_report
from halfbyte.evals.report.facts import (
    Facts,
    Movement,
    Point,
    TrainingFacts,
    mean_kl,
    stored_as,
)
from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.documents import read_json
from halfbyte.formats.manifest import EXPORT, MEASUREMENTS, NAME, described, hashes
from halfbyte.formats.progress import Progress
from halfbyte.quantizer.stages import stage_of
from halfbyte.specs import LoadOptions
from halfbyte.workflows.artefacts import name_of
from halfbyte.workflows.evaluating import Evaluation, Measured, Verdict

DEFAULT = "default"  # the name of our own gate
LAYER_TOKENS = 1024  # what the errors of the layers are measured on


def report(
    evaluation: Evaluation,
    measured: Measured,
    verdict: Verdict | None,
    *,
    texts: Mapping[str, Path],
    directory: Path,
    measured_by: str,
    made_by: str | None = None,
) -> Path:
    """Writes the report into a directory (made if need be); returns where its page is.

    `measured_by` and `made_by` are command lines; by default the manifest tells of the making.
    Raises `InvalidInputError` without a reference, and where no text was read.
    """
    base, against, base_name = evaluation.base, evaluation.against, evaluation.base_name
    if base is None or against is None or base_name is None or not measured.texts:
        raise InvalidInputError(
            "a report sets a model beside its reference, on a text", hint="--against and --text"
        )
    place, source = evaluation.place, evaluation.source
    made = described(place)
    own = Point(name=evaluation.name, bytes=_bytes(source), kl=mean_kl(measured.texts))
    whole = Point(name=base_name, bytes=_bytes(base), kl=0.0)
    facts = Facts(
        name=own.name,
        base=whole.name,
        version=__version__,
        recipe=made.get("recipe", evaluation.options.recipe or "not told"),
        method=made.get("method", "not told"),
        parameters=source.spec.parameters,
        bytes=own.bytes,
        base_bytes=whole.bytes,
        stored=stored_as(source.spec, source.schemes),
        layers=_layers(evaluation, source, base, measured, texts),
        ops=measured.ops,
        kv=evaluation.options.kv,
        reading=measured.reading,
        texts=measured.texts,
        tasks=measured.tasks,
        points=[whole, *_others(place, measured), own],
        front=[
            (p["bytes"], p["predicted_kl"]) for p in made.get("allocation", {}).get("front", [])
        ],
        passed=None if verdict is None else verdict.passed,
        checks=[] if verdict is None else verdict.checks,
        causes=[] if verdict is None else verdict.causes,
        remedies=[] if verdict is None else verdict.remedies,
        files=hashes(place),
        base_files=hashes(against),
        training=_training(made.get("distillation")),
        commands=[*([made_by] if made_by else making(made, whole.name, place)), measured_by],
    )
    directory.mkdir(parents=True, exist_ok=True)
    return write_report(facts, directory)


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What our own gate says of a new artefact, and where its report is."""

    verdict: Verdict
    page: Path


def conclude(
    artefact: Path,
    model: str,
    *,
    made_by: str,
    options: LoadOptions | None = None,
    merged: Sequence[str] = (),
    progress: Progress | None = None,
) -> Conclusion:
    """Measure a directory that was made from `model` (with adapters `merged` into it) on our own
    texts, hold it to our own gate, keep that in its manifest, and put the report into it."""
    evaluation = Evaluation(str(artefact), against=model, options=options, merged=merged)
    texts = evaluation.own_texts
    measured = evaluation.measure(texts, Reading(), progress=progress)
    verdict = evaluation.judge(evaluation.default_gate(), measured, strict=True)
    evaluation.keep(measured, DEFAULT, verdict)
    page = report(
        evaluation,
        measured,
        verdict,
        texts=texts,
        directory=artefact,
        measured_by=f"halfbyte eval {evaluation.name} {evaluation.reference_flags} "
        f"--gate {DEFAULT}",
        made_by=made_by,
    )
    return Conclusion(verdict, page)


def _training(told: Any) -> TrainingFacts | None:
    """What a manifest tells of a training, tensors of a layer put together."""
    if not isinstance(told, dict):
        return None
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in told["moved"]:
        by_part.setdefault(stage_of(tensor["name"]), []).append(tensor)
    movements = [
        Movement(
            part=part,
            moved=fmean(tensor["moved"] for tensor in tensors),
            flipped=_mean([t["flipped"] for t in tensors if t["flipped"] is not None]),
        )
        for part, tensors in by_part.items()
    ]
    curve = [(mark["step"], mark["measure"]) for mark in told["marks"]]
    return TrainingFacts(curve=curve, movements=movements)


def _mean(numbers: Sequence[float]) -> float | None:
    return fmean(numbers) if numbers else None


def _bytes(source: Source) -> int:
    return sum(source.schemes[t.name].bytes(t.shape) for t in source.spec.tensors())


def _layers(
    evaluation: Evaluation,
    source: Source,
    base: Source,
    measured: Measured,
    texts: Mapping[str, Path],
) -> Sequence[LayerError]:
    """On the beginning of the first text; nothing for models whose layers do not correspond."""
    if len(source.spec.layers) != len(base.spec.layers):
        return []
    windows = evaluation.windows(next(iter(texts.values())), measured.reading)
    count = max(1, LAYER_TOKENS // measured.reading.window)
    return layer_errors(source, base, windows[:count])


def _others(place: Path, measured: Measured) -> Iterator[Point]:
    """Artefacts beside this one whose manifests tell of the same texts, read the same way."""
    folder = place.resolve().parent
    for path in sorted([*folder.glob(f"*.{NAME}"), *folder.glob(f"*/{NAME}")]):
        beside = path.parent if path.name == NAME else path.with_name(path.name[: -len(NAME) - 1])
        if beside.resolve() != place.resolve():
            yield from _told(path, name_of(beside), measured)


def _told(manifest: Path, name: str, measured: Measured) -> Iterator[Point]:
    try:
        found = read_json(manifest)
        texts = found[MEASUREMENTS]["texts"]
        tokens = [(text["name"], text["tokens"]) for text in texts]
        if tokens == [(text.name, text.tokens) for text in measured.texts]:
            kl = sum(text["kl"]["mean"] * text["tokens"] for text in texts)
            size = sum(int(file["bytes"]) for file in found["files"].values())
            yield Point(name=name, bytes=size, kl=kl / sum(count for _, count in tokens))
    except (HalfbyteError, KeyError, TypeError, ValueError):
        return  # somebody else's, or measured otherwise


def making(made: Mapping[str, Any], base: str, place: Path) -> Iterator[str]:
    """The command that makes `place` from `base` again, by what its manifest says of it."""
    if made and made.get("method") != EXPORT:
        words = ["halfbyte", "quantize", base, "-o", place.name]
        words += [f"--recipe {made.get('recipe')} --method {made.get('method')}"]
        if "allocation" in made:
            words += [f"--size {made['allocation']['bytes']}"]
        if "calibration" in made:
            words += [f"--calib {quote(name)}" for name in made["calibration"]["files"]]
            words += [
                f"--{key} {made['calibration'][key]}" for key in ("samples", "window", "seed")
            ]
        yield " ".join(words)
