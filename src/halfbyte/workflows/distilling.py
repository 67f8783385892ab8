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
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from halfbyte import __version__
from halfbyte.errors import DoesNotFitError, GateMissedError, InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.reference import Reference
from halfbyte.evals.report.facts import mean_kl
from halfbyte.evals.texts import Reading
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.manifest import check_sizes, weights_hash
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.kernels.choice import choose, oracle
from halfbyte.models.load import load
from halfbyte.numerics.qtensor import QTensor
from halfbyte.planner.probe import forget_peak, peak_bytes, resident_bytes, this_machine
from halfbyte.planner.solve import Model
from halfbyte.planner.training import Training
from halfbyte.planner.ways import TrainingPlan, plan_training
from halfbyte.quantizer.blockwise import Blockwise
from halfbyte.quantizer.calibrate import Calibration, Reader, Sampling
from halfbyte.quantizer.pipeline import refuse_decoded, schemes_of
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.specs import LoadOptions, ModelSpec, Recipe, Scheme, recipe_of
from halfbyte.text.assets import TextAssets
from halfbyte.training.blocks import Layerwise, Lessons
from halfbyte.training.curves import Curve, Mark, Moved, movements
from halfbyte.training.distilling import Distillation, Lesson
from halfbyte.training.generated import generated, restore, save
from halfbyte.training.loop import Outcome, Regimen, Tell, train
from halfbyte.training.modes import Mode, Rates, Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.order import Order
from halfbyte.training.samples import Mix, Passage, SampleReader, Samples, hashes
from halfbyte.training.schedule import Schedule
from halfbyte.training.student import Student
from halfbyte.training.teacher import Teacher, taught
from halfbyte.workflows.artefacts import Artefact, check_storable, finished, write_model
from halfbyte.workflows.evaluating import Evaluation
from halfbyte.workflows.reporting import DEFAULT

CALIBRATED = 256  # windows of the data by which the start is quantized, where none is given
METHOD = "distill"
OWN_PROMPTS = 0.5  # of what the model says itself, the share that answers somebody


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilling:
    """What is learned from, how, and what it is measured on.

    `data` are texts and conversations, `own_tokens` so many more of the model's own; `task` are
    conversations to be learned for themselves, `task_share` of their loss. `held_out` is measured
    at the end, and nothing of it may be learned; by default our own short texts. `start`: a
    quantized form of the model, by default made here. `batch` windows go into a step, `at_once`
    through the model at a time. `budget` bytes decide the mode where it is "auto".
    """

    data: Sequence[Path]
    held_out: Sequence[Path] = ()
    task: Sequence[Path] = ()
    task_share: float = 0.5
    own_tokens: int = 0
    mix: Mix
    held: int = 16
    mode: Mode | Literal["auto"] = "auto"
    steps: int = 1000
    batch: int = 8
    at_once: int = 8
    warmup: float = 0.05
    rates: Rates = field(default_factory=Rates)
    rank: int = 16
    small: bool = False
    again: bool = True
    recipe: str = "q4_0"
    start: Path | None = None
    measure_every: int = 50
    seed: int = 0
    budget: int | None = None
    device: str = "auto"
    threads: int | None = None
    force: bool = False


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
        self._original = read(place)
        self._folder = target.with_name(f"{target.name}.work")
        if self._original.assets is None:
            raise InvalidInputError("has no tokenizer to read texts with", where=place)
        self._assets = self._original.assets
        if asked.mix.length > self._original.spec.context:
            raise InvalidInputError(
                f"is beyond the context of {self._original.spec.context} tokens", where="--window"
            )
        self._recipe: Recipe = recipe_of(asked.recipe)
        self._schemes: Mapping[str, Scheme] = schemes_of(self._original, self._recipe)
        refuse_decoded(self._original, self._schemes)
        check_storable(self._original.spec, self._schemes, target)
        self._oracle = oracle(self._original.spec, asked.device, threads=asked.threads)
        self._device = self._oracle.device
        self._weights = weights_hash(place)

    def run(self, tell: Callable[[str, TrainingPlan], Tell]) -> Distilled:
        mode, plan = self._mode()
        self._lessons  # noqa: B018  # data that is wrong is told before the work
        self._folder.mkdir(parents=True, exist_ok=True)
        stored = dict(self._start.tensors())
        watch = Watch(self._device)
        result, outcomes, marks = self._trained(mode, plan, stored, tell, watch)
        moved = movements(stored, result.tensors())
        return self._concluded(mode, plan, result, outcomes, marks, moved, watch.peak)

    # What is learned from.

    @cached_property
    def _lessons(self) -> tuple[Samples, Samples]:
        """What is learned, and what is held apart to measure on the way."""
        asked, reader = self._asked, SampleReader(self._assets)
        parts: list[Samples] = []
        if asked.data or asked.own_tokens:
            own = self._own(reader) if asked.own_tokens else None
            parts.append(reader.read(asked.data, asked.mix, own))
        if asked.task:
            mix = replace(asked.mix, prompts=0.0)
            parts.append(reader.read(asked.task, mix, supervised=asked.task_share))
        if not parts:
            raise InvalidInputError("nothing to learn from", where="--data", hint="name a text")
        found = Samples.joined(parts)
        if len(found) < asked.held + asked.batch:
            raise InvalidInputError(
                f"{len(found)} windows of {asked.mix.length} tokens are too few for "
                f"{asked.held} that are held apart and a batch of {asked.batch}",
                where="--data",
                hint="more text, or a smaller --window or --batch",
            )
        Reader(self._assets).refuse(self._calibration(found), asked.held_out)
        return found.split(asked.held)

    def _calibration(self, samples: Samples) -> Calibration:
        asked = self._asked
        return Calibration(
            windows=samples.token_ids.tolist(),
            files=hashes([*asked.data, *asked.task]),
            sampling=Sampling(samples=len(samples), window=asked.mix.length, seed=asked.mix.seed),
        )

    def _own(self, reader: SampleReader) -> list[Passage]:
        """What the original says itself; kept beside the output."""
        asked, path = self._asked, self._folder / "own.json"
        longest = asked.mix.length
        count = max(1, asked.own_tokens // longest)
        chats = [file for file in asked.data if file.name.endswith((".jsonl", ".jsonl.gz"))]
        asking = round(OWN_PROMPTS * count) if chats else 0
        prompts: list[list[int]] = []
        for index, file in enumerate(chats):
            prompts += reader.prompts(file, -(-asking // len(chats)), asked.seed + index)
        prompts += [reader.beginning or [0]] * (count - len(prompts))
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            ops = choose(self._original.spec, asked.device, threads=asked.threads)
            said = generated(
                load(self._original, ops),
                prompts,
                longest=longest,
                stop_ids=reader.stop_ids,
                closing=reader.closing,
                seed=asked.seed,
                progress=self._progress,
            )
            save(path, said)
        return [reader.answered(p, a, asked.mix.prompts) for p, a in restore(path)]

    # Where it starts.

    @cached_property
    def _start(self) -> Source:
        if self._asked.start is not None:
            return self._given(self._asked.start)
        taught = self._lessons[0]
        windows = taught.token_ids[: min(CALIBRATED, len(taught)), :-1].tolist()
        calibration = Calibration(
            windows=windows,
            files=hashes([*self._asked.data, *self._asked.task]),
            sampling=Sampling(samples=len(windows), window=taught.length),
        )
        job = {"windows": _digest(windows), **self._identity}
        stages = Stages(
            self._folder / "start", spec=self._original.spec, schemes=self._schemes, job=job
        )
        blockwise = Blockwise(
            self._original,
            self._schemes,
            calibration,
            stages,
            method="gptq",
            device=self._device,
        )
        blockwise.run(self._progress)
        return Finished(self._original, stages, self._schemes)

    def _given(self, path: Path) -> Source:
        check_sizes(path)
        start, spec = read(path), self._original.spec
        if start.spec.vocab != spec.vocab:
            raise InvalidInputError(
                f"has a vocabulary of {start.spec.vocab} tokens, the model one of {spec.vocab}",
                where=path,
                hint="--start is a quantized form of the same model",
            )
        wanted = {tensor.name: tensor.shape for tensor in spec.tensors()}
        if {tensor.name: tensor.shape for tensor in start.spec.tensors()} != wanted:
            raise InvalidInputError("has other tensors than the model", where=path)
        for name, scheme in self._schemes.items():
            if start.schemes[name] != scheme:
                raise InvalidInputError(
                    f"stores {name} as {start.schemes[name].name}, the recipe as {scheme.name}",
                    where=path,
                    hint="quantize it by the same --recipe",
                )
        return start

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
        job = {**self._identity, **self._settings(mode), "start": _hash(stored)}
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
        made = Made(self._original, self._schemes, dict(tensors.results()))
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
        taught, held = self._lessons
        stages = Stages(
            self._folder / "layers", spec=self._original.spec, schemes=self._schemes, job=job
        )
        watch.begin()
        layerwise = Layerwise(
            self._original,
            self._start,
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
        reference = Reference(self._original, self._oracle, weights=self._weights)
        teachers: list[Teacher] = taught(reference, self._lessons, self._progress)
        learned, held = zip(self._lessons, teachers, strict=True)
        return Lesson(*learned), Lesson(*held)

    def _regimen(self) -> Regimen:
        asked = self._asked
        schedule = Schedule(
            steps=asked.steps, rate=1.0, warmup=max(1, round(asked.warmup * asked.steps))
        )
        return Regimen(schedule=schedule, measure_every=asked.measure_every)

    @property
    def _identity(self) -> dict[str, Any]:
        return {
            "halfbyte": __version__,
            "weights": self._weights,
            "schemes": {name: scheme.name for name, scheme in self._schemes.items()},
            # Sums may be ordered by both.
            "device": self._device.partition(":")[0],
            "threads": torch.get_num_threads(),
        }

    def _settings(self, mode: Mode) -> dict[str, Any]:
        """All of what was asked that decides the result."""
        asked, (taught, held) = self._asked, self._lessons
        return {
            "mode": mode,
            "windows": _digest([taught.token_ids.tolist(), held.token_ids.tolist()]),
            "weighted": _digest([taught.weights.tolist(), taught.supervised.tolist()]),
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
            "rules": self._recipe.rules,
            "calibration": self._learned_from(),
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
        published = _published(artefact, fresh, self._target)
        shutil.rmtree(self._folder)
        return Distilled(
            artefact=published,
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
            path, self._place, artefact, recipe=self._recipe.name, method=method, details=details
        )

    def _learned_from(self) -> dict[str, Any]:
        asked = self._asked
        files = hashes([*asked.data, *asked.task])
        return self._lessons[0].facts(files, asked.mix)

    def _started(self) -> Path:
        """The start as an artefact."""
        if self._asked.start is not None:
            return self._asked.start
        path = self._folder / "new" / f"start{self._target.suffix}"
        self._written(self._start, path, "gptq", {})
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
        if self._asked.force or not self._target.exists():
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


class Watch:
    """The most memory that a stretch of this process took, above what it began with."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._before = 0
        self.peak = 0

    def begin(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            forget_peak()
            self._before = resident_bytes()

    def end(self) -> None:
        cuda = self._device.startswith("cuda")
        peak = torch.cuda.max_memory_allocated(self._device) if cuda else peak_bytes()
        self.peak = max(0, peak - self._before)


class Made:
    """A source of tensors that are there; all else is that of another."""

    def __init__(
        self, source: Source, schemes: Mapping[str, Scheme], tensors: Mapping[str, QTensor]
    ) -> None:
        self._source, self._tensors, self.schemes = source, tensors, schemes

    @property
    def spec(self) -> ModelSpec:
        return self._source.spec

    @property
    def assets(self) -> TextAssets | None:
        return self._source.assets

    def tensor(self, name: str) -> QTensor:
        return self._tensors[name]

    def tensors(self) -> Iterator[tuple[str, QTensor]]:
        for tensor in self.spec.tensors():
            yield tensor.name, self._tensors[tensor.name]


def _published(artefact: Artefact, fresh: Path, target: Path) -> Artefact:
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


def _own_bytes(plan: TrainingPlan) -> int:
    """What a plan counts of the training itself, where it is computed."""
    own = (cost for cost in plan.costs if cost.place == "device")
    return sum(cost.bytes for cost in own if not cost.component.startswith("runtime."))


def _digest(values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _hash(tensors: Mapping[str, QTensor]) -> str:
    digest = hashlib.sha256()
    for q in tensors.values():
        digest.update(np.ascontiguousarray(q.data).data)
    return digest.hexdigest()
