"""Quantization-aware training: a model teaches its own four-bit form, and the end is measured.

The chain: data as windows, the best quantization without training as the start, what the original
makes of the windows, the training, and then the proof: the result is measured against the original
on texts that took no part, beside the start and beside what is already there. It takes a place only
where it is better. Everything on the way lies in a folder beside the output, so that a run that was
stopped goes on; it is gone when the output is there.

An adapter that is trained beside a quantized model goes the same way; what ships is the adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.formats.atomic import write_errors
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.lora import is_adapter
from halfbyte.formats.lora_writing import write_adapter
from halfbyte.formats.manifest import weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.planner.ways import TrainingPlan
from halfbyte.specs import LoadOptions
from halfbyte.training.curves import Mark, Moved, movements
from halfbyte.training.loop import Outcome, Tell
from halfbyte.training.low_rank import Adapted
from halfbyte.training.modes import Mode
from halfbyte.workflows.artefacts import Artefact, finished, name_of, published, write_model
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.fitting import fitting, own_bytes
from halfbyte.workflows.judging import Judge
from halfbyte.workflows.material import Material
from halfbyte.workflows.reporting import conclude
from halfbyte.workflows.teaching import Taught, Teaching

METHOD = "distill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """What came of it: the artefact, how the training went, and the texts before and after.

    `planned_bytes` and `peak_bytes` are of the training alone; `beside` is the model that the
    artefact is an adapter of, if it is one."""

    artefact: Artefact
    beside: Path | None
    mode: Mode
    outcomes: Mapping[str, Outcome]
    marks: Sequence[Mark]
    moved: Sequence[Moved]
    before: Sequence[Fidelity]
    after: Sequence[Fidelity]
    planned_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()


def distill(
    model: str,
    target: Path,
    asked: Distilling,
    *,
    tell: Callable[[str, TrainingPlan], Tell],
    progress: Progress | None = None,
) -> Distilled:
    """Train a quantized form of `model`, or an adapter beside one, and put it at `target`, if it is
    better than what is there.

    `tell(what is trained, the plan)` gives whom to tell of it. Raises `InvalidInputError` for data
    that cannot be learned from, `DoesNotFitError` where no mode fits, `GateMissedError` where the
    result is no better than the start, or than what is there.
    """
    place = locate(model, progress)
    _refuse_taken(target, asked)
    return _Job(place, target, asked, progress).run(tell)


class _Job:
    """One distillation: what it needs in the order of need, each made once."""

    def __init__(
        self, place: Path, target: Path, asked: Distilling, progress: Progress | None
    ) -> None:
        self._place, self._target, self._asked, self._progress = place, target, asked, progress
        self._material = Material(place, target, asked, progress)
        self._folder = self._material.folder
        self._judge = Judge(place, asked, progress)

    def run(self, tell: Callable[[str, TrainingPlan], Tell]) -> Distilled:
        self._judge.refuse_texts()
        mode, plan = fitting(self._material, self._asked)
        with write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        stored = dict(self._material.start.tensors())
        teaching = Teaching(self._material, self._asked, mode, stored, self._progress)
        taught = teaching.run(lambda name: tell(name, plan))
        made = taught.made
        moved = () if isinstance(made, Adapted) else movements(stored, made.tensors())
        fresh = self._emptied()
        details = self._details(teaching.settings(), taught, moved)
        artefact = self._written(made, fresh, METHOD, details)
        before, after = self._judged(artefact, fresh, taught)
        moved_to = published(artefact, fresh, self._target)
        shutil.rmtree(self._folder)
        return Distilled(
            artefact=moved_to,
            beside=self._material.body if isinstance(made, Adapted) else None,
            mode=mode,
            outcomes=taught.outcomes,
            marks=taught.marks,
            moved=moved,
            before=before,
            after=after,
            planned_bytes=own_bytes(plan),
            peak_bytes=taught.peak_bytes,
            notes=(*self._material.notes, *self._stale_drafter(made)),
        )

    def _judged(
        self, artefact: Artefact, fresh: Path, taught: Taught
    ) -> tuple[Sequence[Fidelity], Sequence[Fidelity]]:
        """What is held out before and after; the report, where a directory holds one."""
        judge = self._judge
        options = LoadOptions(device=self._asked.device, threads=self._asked.threads)
        if isinstance(taught.made, Adapted):
            body = self._material.body
            before = judge.measured(body)
            after = judge.adapted(body, fresh, kept=True)
            judge.refuse_worse(before, after, taught.outcomes)
            if is_adapter(self._target) and not self._asked.force:
                judge.refuse_better(self._target, judge.adapted(body, self._target), after)
            return before, after
        before = judge.measured(self._started())
        after = judge.measured(fresh, kept=True)
        judge.refuse_worse(before, after, taught.outcomes)
        if _holds_model(self._target) and not self._asked.force:
            judge.refuse_better(self._target, judge.measured(self._target), after)
        if fresh.is_dir():
            conclude(
                fresh,
                str(self._place),
                made_by=self._asked.made_by,
                options=options,
                merged=self._asked.merged,
            )
        return before, after

    # What is written.

    def _emptied(self) -> Path:
        """Where the result is written before it has a place."""
        fresh = self._folder / "new" / self._target.name
        shutil.rmtree(fresh.parent, ignore_errors=True)
        fresh.parent.mkdir(parents=True)
        return fresh

    def _details(
        self, settings: Mapping[str, Any], taught: Taught, moved: Sequence[Moved]
    ) -> dict[str, Any]:
        made, material = taught.made, self._material
        told = {
            **settings,
            "outcomes": {name: asdict(outcome) for name, outcome in taught.outcomes.items()},
            "marks": [asdict(mark) for mark in taught.marks],
            "moved": [asdict(item) for item in moved],
        }
        if isinstance(made, Adapted):
            body = material.body
            own = {"body": {"name": name_of(body), "weights": weights_hash(body)}}
        else:
            own = {"rules": material.recipe.rules}
            told["fingerprint"] = fingerprint(made)
        return {
            **own,
            **material.merged(),
            "calibration": material.learned_from(),
            "distillation": told,
        }

    def _written(
        self, made: Source | Adapted, target: Path, method: str, details: Mapping[str, Any]
    ) -> Artefact:
        place, recipe = self._place, self._material.recipe.name
        if isinstance(made, Adapted):
            target.mkdir()
            spec, updates = self._material.original.spec, self._material.updates
            write_adapter(target, spec, updates, dict(made.pairs()), base=name_of(place))
            path = artefact = target
            recipe = "adapter"
        else:
            path = write_model(made, place, target, self._progress)
            artefact = path if target.suffix == ".gguf" else target
        return finished(path, place, artefact, recipe=recipe, method=method, details=details)

    def _started(self) -> Path:
        """The start as an artefact."""
        if self._asked.start is not None:
            return self._asked.start
        path = self._folder / "new" / f"start{self._target.suffix}"
        self._written(self._material.start, path, "yaqa", {})
        return path

    def _stale_drafter(self, result: Source | Adapted) -> Iterator[str]:
        """A drafter that was trained for other weights says so when it is opened."""
        if isinstance(result, Adapted):
            return
        for place in (self._place, self._target):
            drafter = drafter_beside(place)
            if drafter is None:
                continue
            spec = read(drafter).spec.drafter
            if spec is not None and spec.target != fingerprint(result):
                yield (
                    f"{drafter.name} drafts for other weights, and is slower on these: "
                    "train one anew with halfbyte draft train"
                )
                return


def _refuse_taken(target: Path, asked: Distilling) -> None:
    """What is at `target` that the result could not be held against, or must not stand beside."""
    adapter, model = is_adapter(target), _holds_model(target)
    if (model and asked.mode == "adapter") or (adapter and asked.mode != "adapter"):
        what = "an adapter" if adapter else "a model"
        raise InvalidInputError(f"holds {what}", where=f"-o {target}", hint="name another place")
    if asked.task and (adapter or model) and not asked.force:
        raise InvalidInputError(
            "is there already, and may have learned another task",
            where=f"-o {target}",
            hint="--force writes over it, another -o beside it",
        )


def _holds_model(target: Path) -> bool:
    if is_adapter(target):
        return False
    found = [*target.glob("*.gguf"), *target.glob("*.safetensors")] if target.is_dir() else []
    return target.is_file() or bool(found)
