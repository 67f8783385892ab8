"""The training of a distillation: a mode over windows, resumable, and what it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.formats.checkpoint import Replaced, Source
from halfbyte.formats.progress import Progress
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.stages import Finished, Stages
from halfbyte.training.blocks import Layerwise, Lessons
from halfbyte.training.curves import Curve, Mark
from halfbyte.training.distilling import Distillation, Lesson
from halfbyte.training.fisher import FINAL, FORM, OWN, STATES, Gathered, Hold
from halfbyte.training.grid import trainable
from halfbyte.training.loop import Outcome, Regimen, Tell, train
from halfbyte.training.low_rank import Adapted
from halfbyte.training.modes import NOTHING, Mode, Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.order import Order
from halfbyte.training.schedule import Schedule
from halfbyte.training.student import Student, load_checkpointing
from halfbyte.training.teacher import Teacher, taught
from halfbyte.workflows.asking import Distilling
from halfbyte.workflows.material import Material, digest, hash_of
from halfbyte.workflows.watching import Watch

HOLDING = ("full", "lora", "blockwise")  # modes that move integers


@dataclass(frozen=True, slots=True, kw_only=True)
class Taught:
    """What a training made, a model or an adapter beside one; how it went, by what was trained;
    the most memory it took."""

    made: Source | Adapted
    outcomes: Mapping[str, Outcome]
    marks: Sequence[Mark]
    peak_bytes: int


class Teaching:
    """One training in `mode`. `stored` are the tensors it begins with."""

    def __init__(
        self,
        material: Material,
        asked: Distilling,
        mode: Mode,
        stored: Mapping[str, QTensor],
        progress: Progress | None,
    ) -> None:
        self._material, self._asked, self._mode = material, asked, mode
        self._stored, self._progress = stored, progress
        self._device = material.oracle.device
        self._trainer = Trainer(
            mode=mode,
            device=self._device,
            rank=asked.rank,
            small=asked.small,
            seed=asked.seed,
            rates=asked.rates.holding() if self._holds else asked.rates,
            adapter=material.updates,
        )

    def settings(self) -> dict[str, Any]:
        """All of what was asked that decides the result."""
        asked, (taught, held) = self._asked, self._material.lessons
        return {
            "mode": self._mode,
            "windows": digest([taught.token_ids.tolist(), held.token_ids.tolist()]),
            "weighted": digest([taught.weights.tolist(), taught.supervised.tolist()]),
            "rates": asdict(asked.rates),
            "steps": [asked.steps, asked.batch, asked.at_once, asked.warmup],
            "curvature": [asked.curvature, FORM, STATES, OWN] if self._holds else None,
            "other": [asked.rank, asked.small, asked.again, asked.measure_every, asked.seed],
            "adapter": [asdict(update) for update in self._material.updates],
        }

    def run(self, tell: Callable[[str], Tell]) -> Taught:
        """Trains, or goes on where it was; `tell` gives whom to tell, by what is trained."""
        job = {**self._material.identity, **self.settings(), "start": hash_of(self._stored)}
        if self._mode == "blockwise":
            return self._by_layers(job, tell)
        return self._whole(job, tell(self._mode))

    def _whole(self, job: Mapping[str, Any], tell: Tell) -> Taught:
        asked, material = self._asked, self._material
        original = material.original
        taught, held = self._lessons()
        known = self._known()
        if asked.again:
            load_checkpointing()
        watch = Watch(self._device)
        watch.begin()
        tensors = self._trainer.tensors(original.tensor, self._stored, known or NOTHING)
        hold, metric = None, None
        if known is not None:
            hold = Hold(known, tensors, original.tensor)
            metric = known.metric(FINAL, original.spec.hidden)
        student = Student(original.spec, tensors, TrainingOps(self._device), again=asked.again)
        order = Order(count=len(taught.samples), batch=asked.batch, seed=asked.seed)
        folder = material.folder / "run"
        curve = Curve(folder / "curve.jsonl", asked.measure_every)
        outcome = train(
            Distillation(
                student, taught, held, order, at_once=asked.at_once, hold=hold, metric=metric
            ),
            self._trainer.optimizer(tensors),
            self._regimen(),
            folder,
            job=job,
            tell=curve.told(tell),
        )
        watch.end()
        made: Source | Adapted = (
            tensors if isinstance(tensors, Adapted) else Replaced(original, dict(tensors.results()))
        )
        return Taught(
            made=made,
            outcomes={self._mode: outcome},
            marks=curve.marks(),
            peak_bytes=watch.peak,
        )

    @property
    def _holds(self) -> bool:
        """Whether it knows what errors cost, and holds on to that."""
        asked = self._asked
        return self._mode in HOLDING and not asked.task and asked.curvature > 0

    def _known(self) -> Gathered | None:
        if not self._holds:
            return None
        matrices = {
            name: q
            for name, q in self._stored.items()
            if name.startswith("layers.") and len(q.shape) > 1 and trainable(q.scheme)
        }
        whole = self._mode == "full" and not self._asked.small
        return self._material.gathered(matrices, whole=whole)

    def _by_layers(self, job: Mapping[str, Any], tell: Callable[[str], Tell]) -> Taught:
        asked, material = self._asked, self._material
        taught, held = material.lessons
        stages = Stages(
            material.folder / "layers",
            spec=material.original.spec,
            schemes=material.schemes,
            job=job,
        )
        known = self._known()
        watch = Watch(self._device)
        watch.begin()
        layerwise = Layerwise(
            material.original,
            material.start,
            [*taught.inputs(range(len(taught))), *held.inputs(range(len(held)))],
            stages,
            Lessons(
                regimen=self._regimen(),
                batches=max(1, asked.batch // asked.at_once),
                held=max(1, asked.held // asked.at_once),
                seed=asked.seed,
            ),
            self._trainer,
            at_once=asked.at_once,
            known=known,
        )
        outcomes = layerwise.run(tell, job)
        watch.end()
        made = Finished(material.original, stages, material.schemes)
        return Taught(made=made, outcomes=outcomes, marks=[], peak_bytes=watch.peak)

    def _lessons(self) -> tuple[Lesson, Lesson]:
        """The windows with what the original makes of them."""
        material = self._material
        teachers: list[Teacher] = taught(
            material.original,
            material.lessons,
            weights=material.weights,
            device=self._device,
            progress=self._progress,
        )
        learned, held = zip(material.lessons, teachers, strict=True)
        return Lesson(*learned), Lesson(*held)

    def _regimen(self) -> Regimen:
        asked = self._asked
        schedule = Schedule(
            steps=asked.steps, rate=1.0, warmup=max(1, round(asked.warmup * asked.steps))
        )
        return Regimen(
            schedule=schedule,
            measure_every=asked.measure_every,
            save_every_s=asked.save_every_s,
        )
