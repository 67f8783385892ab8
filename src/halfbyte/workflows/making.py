"""Making an artefact: quantize a checkpoint, with a manifest beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.manifest import check_sizes, weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import oracle
from halfbyte.quantizer.calibrate import Calibration, Reader, Sampling
from halfbyte.quantizer.calibrated import calibrated
from halfbyte.quantizer.pipeline import Quantized, refuse_decoded, schemes_of
from halfbyte.quantizer.recovered import Recovered
from halfbyte.specs import Method, SolveMethod, recipe_of
from halfbyte.workflows.artefacts import Artefact, check_storable, finished, write_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrating:
    """The texts and conversations to calibrate on, and those it must keep its hands off.

    `held_out` will be measured: calibration that holds some of it is refused. `device` and
    `threads`: what computes.
    """

    files: Sequence[Path]
    sampling: Sampling
    held_out: Sequence[Path] = ()
    device: str = "auto"
    threads: int | None = None


def quantize(
    model: str,
    target: Path,
    *,
    recipe: str = "q4_0",
    method: SolveMethod | None = None,
    calibrating: Calibrating | None = None,
    lattice: bool = True,
    progress: Progress | None = None,
) -> Artefact:
    """Quantize a checkpoint to a GGUF with its manifest.

    `target`: a .gguf file, or a directory (made if need be) that gets model.gguf; with schemes that
    no GGUF has it becomes one of safetensors (compressed-tensors), and must be new. `method` is
    gptq where there is something to calibrate on, else search. `lattice`: matrices that lie on a
    Q4_0 lattice are stored as they are. Memory: the largest tensor; with calibration a layer, and
    the states of the windows. What a stopped calibration has done is kept beside `target`.
    """
    place = locate(model, progress)
    check_sizes(place)
    wanted, original = recipe_of(recipe), read(place)
    source: Source = original
    details: dict[str, Any] = {"rules": wanted.rules}
    found = Recovered(source, wanted) if lattice else None
    if found is not None:
        source, wanted = found, found.recipe
    schemes = schemes_of(source, wanted)
    refuse_decoded(original, schemes)
    check_storable(source.spec, schemes, target)
    if calibrating is None:
        method = method or "search"
        quantized = Quantized(source, wanted, method=_uncalibrated(method))
        path = write_model(quantized, place, target, progress)
    else:
        method = method or "gptq"
        calibration = _calibration(source, calibrating, place)
        details["calibration"] = calibration.facts()
        with calibrated(
            source,
            wanted,
            calibration,
            method=method,
            weights=weights_hash(place),
            folder=_work_folder(target),
            device=oracle(source.spec, calibrating.device, threads=calibrating.threads).device,
            progress=progress,
        ) as quantized:
            path = write_model(quantized, place, target, progress)
    if found and found.matrices:
        details["lattice"] = {"matrices": found.matrices, **asdict(found.counts)}
    artefact = path if target.suffix == ".gguf" else target
    return finished(path, place, artefact, recipe=recipe, method=method, details=details)


def _uncalibrated(method: SolveMethod) -> Method:
    """The method, if it is one that needs no calibration."""
    if method == "rtn" or method == "search":
        return method
    raise InvalidInputError(
        f"{method} needs texts to calibrate on", where="--method", hint="name some with --calib"
    )


def _calibration(source: Source, calibrating: Calibrating, place: Path) -> Calibration:
    if source.assets is None:
        raise InvalidInputError("has no tokenizer to read texts with", where=place)
    if calibrating.sampling.window > source.spec.context:
        raise InvalidInputError(
            f"is beyond the context of {source.spec.context} tokens", where="--window"
        )
    reader = Reader(source.assets)
    calibration = reader.read(calibrating.files, calibrating.sampling)
    reader.refuse(calibration, calibrating.held_out)
    return calibration


def _work_folder(target: Path) -> Path:
    """Where a long job keeps what is finished."""
    return target.with_name(f"{target.name}.work")
