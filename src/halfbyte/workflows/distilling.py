"""Quantization-aware training: a model teaches its own four-bit form, and the end is measured.

The chain: data as windows, the best quantization without training as the start, what the original
makes of the windows, the training, and then the proof: the result is measured against the original
on texts that took no part, beside the start and beside what is already there. It takes a place only
where it is better. Everything on the way lies in a folder beside the output, so that a run that was
stopped goes on; it is gone when the output is there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.errors import DoesNotFitError, GateMissedError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.reference import Reference
from halfbyte.evals.report.facts import mean_kl
from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.manifest import check_sizes
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.numerics.qtensor import QTensor
from halfbyte.planner.probe import this_machine
from halfbyte.planner.solve import Model
from halfbyte.planner.training import Training
from halfbyte.planner.ways import TrainingPlan, plan_training
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.specs import LoadOptions
from halfbyte.training.blocks import Layerwise, Lessons
from halfbyte.training.curves import Curve, Mark, Moved, movements
from halfbyte.training.distilling import Distillation, Lesson
from halfbyte.training.loop import Outcome, Regimen, Tell, train
from halfbyte.training.modes import Mode, Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.order import Order
from halfbyte.training.schedule import Schedule
from halfbyte.training.student import Results, Student
from halfbyte.training.teacher import Teacher, taught
from halfbyte.workflows.artefacts import Artefact, finished, published, write_model
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.evaluating import Evaluation
from halfbyte.workflows.material import Material, digest
from halfbyte.workflows.reporting import DEFAULT, conclude
from halfbyte.workflows.watching import Watch

CALIBRATED = 256  # windows of the data by which the start is quantized, where none is given
METHOD = "distill"
OWN_PROMPTS = 0.5  # of what the model says itself, the share that answers somebody


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """What came of it: the artefact, how the training went, and the texts before and after.

    `planned_bytes` and `peak_bytes` are of the training alone."""

    artefact: Artefact
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
    """Train a quantized form of `model` and put it at `target`, if it is better than what is there.

    `tell(what is trained, the plan)` gives whom to tell of it. Raises `InvalidInputError` for data
    that cannot be learned from, `DoesNotFitError` where no mode fits, `GateMissedError` where the
    result is no better than the start, or than what is there.
    """
    place = locate(model, progress)
    check_sizes(place)
    job = _Job(place, target, asked, progress)
    return job.run(tell)


PLANNED: dict[Mode, Any] = {
    "full": "qat",
    "lora": "qat-lora",
    "scales": "scales",
    "blockwise": "blockwise",
}


class _Job:
    """One distillation: what it needs in the order of need, each made once."""

    def __init__(
        self, place: Path, target: Path, asked: Distilling, progress: Progress | None
    ) -> None:
        self._place, self._target, self._asked, self._progress = place, target, asked, progress
        self._material = Material(place, target, asked, progress)
        self._original, self._schemes = self._material.original, self._material.schemes
        self._folder, self._device = self._material.folder, self._material.oracle.device

    def run(self, tell: Callable[[str, TrainingPlan], Tell]) -> Distilled:
        mode, plan = self._mode()
        self._folder.mkdir(parents=True, exist_ok=True)
        stored = dict(self._material.start.tensors())
        watch = Watch(self._device)
        result, outcomes, marks = self._trained(mode, plan, stored, tell, watch)
        moved = movements(stored, result.tensors())
        return self._concluded(mode, plan, result, outcomes, marks, moved, watch.peak)

    # How it is trained.

    def _mode(self) -> tuple[Mode, TrainingPlan]:
        """The mode that was asked for; by default the first that fits, the best ones first."""
        asked = self._asked.mode
        modes: Sequence[Mode] = [*PLANNED] if asked == "auto" else [asked]
        plans: list[tuple[Mode, TrainingPlan]] = [(mode, self._plan(mode)) for mode in modes]
        for mode, plan in plans:
            if plan.fits or (asked != "auto" and self._asked.budget is None):
                return mode, plan
        smallest, least = min(plans, key=lambda found: found[1].total())
        raise DoesNotFitError(
            f"{smallest} takes {least.total() / 1e9:.2f} GB, "
            f"there are {least.budget_bytes / 1e9:.2f} GB",
            where="--budget",
            hint="a smaller --at-once or --window, or --small",
        )

    def _plan(self, mode: Mode) -> TrainingPlan:
        asked = self._asked
        model = Model(
            name=self._place.name,
            spec=self._original.spec,
            schemes=self._original.schemes,
            quantized=False,
        )
        training = Training(
            mode=PLANNED[mode],
            batch=asked.at_once,
            length=asked.mix.length,
            precision="bf16" if asked.small else "fp32",
            optimizer="adamw-8bit" if asked.small else "adamw",
            checkpointing=asked.again,
            rank=asked.rank,
            recipe=asked.recipe,
            tokens=asked.mix.count * asked.mix.length,
        )
        kind = "cuda" if self._device.startswith("cuda") else "cpu"
        machine = this_machine(kind)
        return plan_training(model, machine, training, budget_bytes=asked.budget)

    def _trained(
        self,
        mode: Mode,
        plan: TrainingPlan,
        stored: Mapping[str, QTensor],
        tell: Callable[[str, TrainingPlan], Tell],
        watch: Watch,
    ) -> tuple[Source, Mapping[str, Outcome], Sequence[Mark]]:
        asked = self._asked
        trainer = Trainer(
            mode=mode,
            device=self._device,
            rank=asked.rank,
            small=asked.small,
            seed=asked.seed,
            rates=asked.rates,
        )
        job = {**self._material.identity, **self._settings(mode), "start": _hash(stored)}
        if mode == "blockwise":
            return self._by_layers(trainer, plan, job, tell, watch)
        taught, held = self._taught()
        watch.begin()
        ops = TrainingOps(self._device)
        tensors = trainer.tensors(self._original.tensor, stored)
        student = Student(self._original.spec, tensors, ops, again=asked.again)
        order = Order(count=len(taught.samples), batch=asked.batch, seed=asked.seed)
        task = Distillation(student, taught, held, order, at_once=asked.at_once)
        folder = self._folder / "run"
        curve = Curve(folder / "curve.jsonl", asked.measure_every)
        outcome = train(
            task,
            trainer.optimizer(tensors),
            self._regimen(),
            folder,
            job=job,
            tell=curve.told(tell(mode, plan)),
        )
        watch.end()
        made = Results(self._original, self._schemes, dict(tensors.results()))
        return made, {mode: outcome}, curve.marks()

    def _by_layers(
        self,
        trainer: Trainer,
        plan: TrainingPlan,
        job: Mapping[str, Any],
        tell: Callable[[str, TrainingPlan], Tell],
        watch: Watch,
    ) -> tuple[Source, Mapping[str, Outcome], Sequence[Mark]]:
        asked = self._asked
        taught, held = self._material.lessons
        stages = Stages(
            self._folder / "layers", spec=self._original.spec, schemes=self._schemes, job=job
        )
        watch.begin()
        layerwise = Layerwise(
            self._original,
            self._material.start,
            [*taught.inputs(range(len(taught))), *held.inputs(range(len(held)))],
            stages,
            Lessons(
                regimen=self._regimen(),
                batches=max(1, asked.batch // asked.at_once),
                held=max(1, asked.held // asked.at_once),
                seed=asked.seed,
            ),
            trainer,
            at_once=asked.at_once,
        )
        outcomes = layerwise.run(lambda stage: tell(stage, plan), job)
        watch.end()
        return Finished(self._original, stages, self._schemes), outcomes, []

    def _taught(self) -> tuple[Lesson, Lesson]:
        """The windows with what the original makes of them."""
        reference = Reference(self._original, self._material.oracle, weights=self._material.weights)
        teachers: list[Teacher] = taught(reference, self._material.lessons, self._progress)
        learned, held = zip(self._material.lessons, teachers, strict=True)
        return Lesson(*learned), Lesson(*held)

    def _regimen(self) -> Regimen:
        asked = self._asked
        schedule = Schedule(
            steps=asked.steps, rate=1.0, warmup=max(1, round(asked.warmup * asked.steps))
        )
        return Regimen(schedule=schedule, measure_every=asked.measure_every)

    def _settings(self, mode: Mode) -> dict[str, Any]:
        """All of what was asked that decides the result."""
        asked, (taught, held) = self._asked, self._material.lessons
        return {
            "mode": mode,
            "windows": digest([taught.token_ids.tolist(), held.token_ids.tolist()]),
            "weighted": digest([taught.weights.tolist(), taught.supervised.tolist()]),
            "rates": asdict(asked.rates),
            "steps": [asked.steps, asked.batch, asked.at_once, asked.warmup],
            "other": [asked.rank, asked.small, asked.again, asked.measure_every, asked.seed],
        }

    # What came of it.

    def _concluded(
        self,
        mode: Mode,
        plan: TrainingPlan,
        result: Source,
        outcomes: Mapping[str, Outcome],
        marks: Sequence[Mark],
        moved: Sequence[Moved],
        peak: int,
    ) -> Distilled:
        fresh = self._folder / "new" / self._target.name
        shutil.rmtree(fresh.parent, ignore_errors=True)
        fresh.parent.mkdir(parents=True)
        details = {
            "rules": self._material.recipe.rules,
            "calibration": self._material.learned_from(),
            "distillation": {
                **self._settings(mode),
                "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
                "marks": [asdict(mark) for mark in marks],
                "moved": [asdict(item) for item in moved],
                "fingerprint": fingerprint(result),
            },
        }
        artefact = self._written(result, fresh, METHOD, details)
        before = self._measured(self._started())
        after = self._measured(fresh)
        self._refuse_worse(before, after)
        if fresh.is_dir():
            options = LoadOptions(device=self._asked.device, threads=self._asked.threads)
            made_by = self._asked.made_by
            conclude(fresh, str(self._place), made_by=made_by, options=options)
        moved_to = published(artefact, fresh, self._target)
        shutil.rmtree(self._folder)
        return Distilled(
            artefact=moved_to,
            mode=mode,
            outcomes=outcomes,
            marks=marks,
            moved=moved,
            before=before,
            after=after,
            planned_bytes=_own_bytes(plan),
            peak_bytes=peak,
            notes=tuple(self._stale_drafter(result)),
        )

    def _written(
        self, source: Source, target: Path, method: str, details: Mapping[str, Any]
    ) -> Artefact:
        path = write_model(source, self._place, target, self._progress)
        artefact = path if target.suffix == ".gguf" else target
        return finished(
            path,
            self._place,
            artefact,
            recipe=self._material.recipe.name,
            method=method,
            details=details,
        )

    def _started(self) -> Path:
        """The start as an artefact."""
        if self._asked.start is not None:
            return self._asked.start
        path = self._folder / "new" / f"start{self._target.suffix}"
        self._written(self._material.start, path, "gptq", {})
        return path

    def _measured(self, artefact: Path) -> Sequence[Fidelity]:
        """On what is held out, and kept in the artefact's manifest."""
        options = LoadOptions(device=self._asked.device, threads=self._asked.threads)
        evaluation = Evaluation(str(artefact), against=str(self._place), options=options)
        held_out = {path.name: path for path in self._asked.held_out}
        texts = held_out or evaluation.own_texts
        measured = evaluation.measure(texts, Reading(), progress=self._progress)
        if artefact.is_relative_to(self._folder):
            verdict = evaluation.judge(evaluation.default_gate(), measured, strict=True)
            evaluation.keep(measured, DEFAULT, verdict)
        return measured.texts

    def _refuse_worse(self, before: Sequence[Fidelity], after: Sequence[Fidelity]) -> None:
        """What is there already counts too, unless it is to be written over whatever it is."""
        found = mean_kl(after)
        if found >= mean_kl(before):
            raise GateMissedError(
                f"the training came to a KL of {found:.5f} on the held-out texts, "
                f"the start has {mean_kl(before):.5f}; nothing was written",
                hint="lower --rate, more --data, or data more like the held-out texts",
            )
        if self._asked.force or not _holds_model(self._target):
            return
        there = mean_kl(self._measured(self._target))
        if there <= found:
            raise GateMissedError(
                f"has a KL of {there:.5f} on the held-out texts, the training came to {found:.5f}",
                where=self._target,
                hint="--force writes over it, another -o beside it",
            )

    def _stale_drafter(self, result: Source) -> Iterator[str]:
        """A drafter that was trained for other weights says so when it is opened."""
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


def _holds_model(target: Path) -> bool:
    found = [*target.glob("*.gguf"), *target.glob("*.safetensors")] if target.is_dir() else []
    return target.is_file() or bool(found)


def _own_bytes(plan: TrainingPlan) -> int:
    """What a plan counts of the training itself, where it is computed."""
    own = (cost for cost in plan.costs if cost.place == "device")
    return sum(cost.bytes for cost in own if not cost.component.startswith("runtime."))


def _hash(tensors: Mapping[str, QTensor]) -> str:
    digest = hashlib.sha256()
    for q in tensors.values():
        digest.update(np.ascontiguousarray(q.data).data)
    return digest.hexdigest()
