"""Making an artefact: quantize a checkpoint, with a manifest beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
from halfbyte.quantizer.sensitivity import priced
from halfbyte.quantizer.sized import Allocation, allocated
from halfbyte.specs import Recipe, SolveMethod, recipe_of
from halfbyte.workflows.artefacts import Artefact, check_storable, finished, write_model

PRICED = 32  # windows by which the groups of tensors are priced


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
    size: int | None = None,
    method: SolveMethod | None = None,
    calibrating: Calibrating | None = None,
    lattice: bool = True,
    progress: Progress | None = None,
) -> Artefact:
    """Quantize a checkpoint to a GGUF with its manifest.

    `target`: a .gguf file, or a directory (made if need be) that gets model.gguf; with schemes that
    no GGUF has it becomes one of safetensors (compressed-tensors), and must be new. `size`: the
    bytes that all tensors may take; matrices get the schemes that cost least within it, whatever
    the recipe says of them. `method` is gptq where there is something to calibrate on, else search.
    `lattice`: matrices that lie on a Q4_0 lattice are stored as they are. Memory: the largest
    tensor; with calibration a layer, and the states of the windows. What a stopped calibration has
    done is kept beside `target`.
    """
    place = locate(model, progress)
    check_sizes(place)
    wanted, original = recipe_of(recipe), read(place)
    method = method or ("search" if calibrating is None else "gptq")
    details: dict[str, Any] = {"rules": wanted.rules}
    source: Source = original
    found = Recovered(source, wanted) if lattice else None
    if found is not None:
        source, wanted = found, found.recipe
    job = None
    if calibrating is not None:
        job = _Job(source, place, target, calibrating, progress)
        details["calibration"] = job.calibration.facts()
    if size is not None:
        allocation = _needed(job, "--size").allocation(wanted, size)
        wanted, details["allocation"] = allocation.recipe, allocation.facts()
    schemes = schemes_of(source, wanted)
    refuse_decoded(original, schemes)
    check_storable(source.spec, schemes, target)
    with _quantized(job, source, wanted, method) as quantized:
        path = write_model(quantized, place, target, progress)
        if found and found.matrices:
            details["lattice"] = {"matrices": found.matrices, **asdict(found.counts)}
        artefact = path if target.suffix == ".gguf" else target
        return finished(path, place, artefact, recipe=recipe, method=method, details=details)


class _Job:
    """What a calibrated quantization has: the windows, a device, and a folder beside its output."""

    def __init__(
        self,
        source: Source,
        place: Path,
        target: Path,
        calibrating: Calibrating,
        progress: Progress | None,
    ) -> None:
        self._source, self._place, self._progress = source, place, progress
        self._folder = target.with_name(f"{target.name}.work")
        self.calibration = _calibration(source, calibrating, place)
        ops = oracle(source.spec, calibrating.device, threads=calibrating.threads)
        self._device = ops.device

    def allocation(self, base: Recipe, budget: int) -> Allocation:
        """The best recipe for a budget of bytes."""
        windows = self.calibration.some(PRICED)
        costs = priced(self._source, windows, self._folder.parent, device=self._device)
        return allocated(self._source, base, costs, budget)

    def quantized(self, recipe: Recipe, method: SolveMethod) -> AbstractContextManager[Source]:
        return calibrated(
            self._source,
            recipe,
            self.calibration,
            method=method,
            weights=weights_hash(self._place),
            folder=self._folder,
            device=self._device,
            progress=self._progress,
        )


def _needed(job: _Job | None, flag: str) -> _Job:
    if job is None:
        raise InvalidInputError(
            "needs texts to calibrate on", where=flag, hint="name some with --calib"
        )
    return job


def _quantized(
    job: _Job | None, source: Source, recipe: Recipe, method: SolveMethod
) -> AbstractContextManager[Source]:
    """The source by a recipe; what a job keeps beside its output is gone when the block ends."""
    if job is None and (method == "rtn" or method == "search"):
        return nullcontext(Quantized(source, recipe, method=method))
    return _needed(job, f"--method {method}").quantized(recipe, method)


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
