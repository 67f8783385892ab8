"""Making a drafter for a target: what it says is collected, learned, quantized and checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.formats.checkpoint import Source, write_gguf
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.jobs import claim
from halfbyte.formats.manifest import weights_hash, write_manifest
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.kernels.choice import oracle
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.planner.probe import this_machine
from halfbyte.quantizer.opening import open_source
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import AUTO, ModelSpec, paired_layers, recipe_of
from halfbyte.training.adamw import AdamW
from halfbyte.training.beginnings import beginning, first_copied, shape
from halfbyte.training.drafting import DraftTask, Teaching, held_out
from halfbyte.training.entry import fitted_entry
from halfbyte.training.loop import Outcome, Regimen, Tell, train
from halfbyte.training.passages import Passage
from halfbyte.training.schedule import Schedule
from halfbyte.training.seen import RowLayout, Seen
from halfbyte.training.tensors import Tensors, weights_of
from halfbyte.workflows.artefacts import size_of
from halfbyte.workflows.listening import Listening

RECIPES = ("q4_0", "q8_0")  # the smallest first
TOLERATED = 0.01  # of the accepted drafts that a smaller drafter may lose
NONE = "none"
DECODED = 2**30  # bytes of decoded weights that the reference keeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a new drafter is like; what is None is chosen by the target's size. `shortlist` are the
    tokens that its head has. `start`: a drafter to go on from, "auto" the one beside the target
    (unless a shape is asked for), "none" to begin anew."""

    layers: int | None = None
    hidden: int | None = None
    width: int | None = None
    shortlist: Sequence[int] | None = None
    start: str = AUTO
    own_head: bool = False

    @property
    def shaped(self) -> bool:
        """Is a shape asked for?"""
        asked = (self.layers, self.hidden, self.width, self.shortlist)
        return any(part is not None for part in asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """How it is taught: so many passes over the lessons, at a peak rate; `recipe` is how it is
    stored, "auto" the smallest that keeps its acceptance."""

    passes: float = 2.0
    rate: float = 2e-3
    length: int = 4
    rows: int = 1024
    recipe: str = AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A drafter on the disk. `accepted`: of all rounds on the greedy answers held out, how often
    the first draft is right, the second with it, ...; `before` as it began, `exact` before it was
    quantized."""

    path: Path
    manifest: Path
    bytes: int
    recipe: str
    rows: int
    before: Sequence[float]
    exact: Sequence[float]
    accepted: Sequence[float]
    outcome: Outcome

    @property
    def tokens_per_round(self) -> float:
        return 1 + sum(self.accepted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What training takes, in bytes, by what takes it."""

    rows: Mapping[str, int]
    disk: int

    @property
    def total(self) -> int:
        return sum(self.rows.values())


class Drafting:
    """The making of one drafter, a step at a time."""

    def __init__(self, listening: Listening, target: Path, *, build: Build, course: Course) -> None:
        if target.suffix != ".gguf":
            raise InvalidInputError("a drafter is written as X.gguf", where=target)
        self._path = target
        self._folder = target.with_name(f"{target.name}.work")
        self._listening, self._build, self._course = listening, build, course
        self._place, self._source = listening.place, listening.source
        self._lessons = listening.lessons
        self._begun: Path | None = None
        start = self._start_from = self._start()
        self.spec = self._shape() if start is None else self._renewed(start.spec)

    def _start(self) -> Source | None:
        """The drafter to go on from. One only found beside the target may be of another shape."""
        named = self._build.start not in (AUTO, NONE)
        if self._build.start == NONE or (self._build.shaped and not named):
            return None
        if self._build.shaped:
            raise InvalidInputError(
                "a drafter that is gone on from keeps its shape",
                where="--start",
                hint="--start none with --layers, --hidden, --width or --shortlist",
            )
        found = locate(self._build.start) if named else drafter_beside(self._place)
        if found is None:
            return None
        source = open_source(str(found))
        try:
            paired_layers(source.spec, self._source.spec)
        except InvalidInputError:
            if named:
                raise
            return None
        if source.spec.drafter is not None and source.spec.drafter.centroids is not None:
            raise InvalidInputError("drafters with a head in clusters are not trained", where=found)
        self._begun = found
        return source

    def _shape(self) -> ModelSpec:
        build = self._build
        return shape(
            self._source.spec,
            layers=build.layers,
            hidden=build.hidden,
            width=build.width,
            head_rows=None if build.shortlist is None else len(build.shortlist),
            fingerprint=fingerprint(self._source),
        )

    def _renewed(self, spec: ModelSpec) -> ModelSpec:
        """The same shape for this target."""
        assert spec.drafter is not None
        return replace(spec, drafter=replace(spec.drafter, target=fingerprint(self._source)))

    def need(self) -> Need:
        """What it will take: arithmetic, but for a step's activations, which are estimated."""
        spec, target, course = self.spec, self._source.spec, self._course
        layout = RowLayout.of(target, paired_layers(spec, target))
        heads = max((layer.attention.query_width for layer in spec.layers), default=0)
        wide = sum(8 * spec.hidden + 3 * layer.mlp.width + 4 * heads for layer in spec.layers)
        prompts = 2  # tokens of prompts for every one that is learned, about
        return Need(
            rows={
                "the target, stored and decoded": sum(
                    self._source.schemes[tensor.name].bytes(tensor.shape)
                    for tensor in target.tensors()
                )
                + min(4 * target.parameters, DECODED)
                + 4 * target.vocab * target.hidden,
                "the drafter, its gradients and moments": 16 * spec.parameters,
                "a step's activations": 4 * course.rows * course.length * (wide + 4 * target.hidden)
                + 4 * 4 * min(course.rows * target.vocab, 1 << 26),
            },
            disk=2 * layout.numbers * self._lessons.tokens * (1 + prompts),
        )

    def check(self) -> Need:
        """What it will take. Raises `DoesNotFitError` where the machine has less."""
        need, machine = self.need(), this_machine()
        free = machine.memory_bytes - machine.used_bytes
        if need.total > free:
            raise DoesNotFitError(
                f"training takes about {need.total / 2**30:.1f} GiB; {free / 2**30:.1f} are free",
                hint="a smaller --rows, --hidden or --layers",
            )
        return need

    def run(self, passages: Sequence[Passage], *, seeing: Progress | None, tell: Tell) -> Trained:
        """Teach it, quantize it, and write it with its manifest."""
        target = load(self._source, self._oracle())
        apart = held_out(passages)
        if not apart:
            raise InvalidInputError(
                "no answer is long enough to measure on", hint="more --tokens, or other --data"
            )
        teaching = self._teaching(passages, apart)
        job = {
            "target": weights_hash(self._place),
            "lessons": _hash([passage.ids for passage in passages]),
            "spec": repr(self.spec),
            "course": asdict(self._course),
            "start": self._build.start if self._begun is None else weights_hash(self._begun),
        }
        claim(self._folder, job)
        task = DraftTask(
            self.spec,
            self._beginning(target, passages),
            target,
            passages,
            self._seen(target, passages, seeing),
            held_out=apart,
            head_fixed=not self._build.own_head and self.spec.hidden == target.spec.hidden,
            teaching=teaching,
        )
        before = task.accepted()
        outcome = self._taught(task, teaching, job, tell)
        exact = task.accepted()
        learned = Tensors(spec=self.spec, weights=task.copied())
        recipe, accepted = self._smallest(task, learned, exact)
        write_gguf(
            Quantized(learned, recipe_of(recipe)),
            self._path,
            extra_metadata={"general.name": self._path.stem},
        )
        made = Trained(
            path=self._path,
            manifest=self._manifest(recipe, accepted, outcome),
            bytes=size_of(self._path),
            recipe=recipe,
            rows=teaching.steps * teaching.rows,
            before=before,
            exact=exact,
            accepted=accepted,
            outcome=outcome,
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        return made

    def _oracle(self) -> ReferenceOps:
        listening = self._listening
        return oracle(self._source.spec, listening.device, threads=listening.threads)

    def _beginning(self, target: Decoder, passages: Sequence[Passage]) -> Mapping[str, Tensor]:
        if self._start_from is not None:
            return weights_of(self._start_from)
        entry = fitted_entry(target, first_copied(self.spec, target.spec), passages)
        return beginning(self.spec, self._source, entry, self._build.shortlist)

    def _teaching(self, passages: Sequence[Passage], apart: Sequence[int]) -> Teaching:
        course = self._course
        learned = sum(it.learned for it in passages) - sum(passages[i].learned for i in apart)
        return Teaching(
            steps=max(1, round(course.passes * learned / course.rows)),
            length=course.length,
            rows=course.rows,
            seed=self._lessons.seed,
        )

    def _seen(
        self, target: Decoder, passages: Sequence[Passage], progress: Progress | None
    ) -> Seen:
        folder = self._folder / "seen"
        folder.mkdir(exist_ok=True)
        layout = RowLayout.of(target.spec, paired_layers(self.spec, target.spec))
        seen = Seen(layout, passages, folder)
        seen.make(target, progress)
        return seen

    def _taught(
        self, task: DraftTask, teaching: Teaching, job: Mapping[str, Any], tell: Tell
    ) -> Outcome:
        steps = teaching.steps
        return train(
            task,
            AdamW(parameters=task.parameters),
            Regimen(
                schedule=Schedule(steps=steps, rate=self._course.rate, warmup=max(1, steps // 20)),
                measure_every=max(10, steps // 12),
            ),
            self._folder / "training",
            job=job,
            tell=tell,
        )

    def _smallest(
        self, task: DraftTask, learned: Tensors, exact: Sequence[float]
    ) -> tuple[str, list[float]]:
        """The recipe it is stored in, and how often its drafts are right in it."""
        asked = self._course.recipe
        for recipe in RECIPES if asked == AUTO else (asked,):
            task.put(weights_of(Quantized(learned, recipe_of(recipe))))
            accepted = task.accepted()
            if recipe in (asked, RECIPES[-1]) or sum(accepted) >= (1 - TOLERATED) * sum(exact):
                return recipe, accepted
        raise AssertionError("the last recipe is always taken")

    def _manifest(self, recipe: str, accepted: Sequence[float], outcome: Outcome) -> Path:
        details = {
            "lessons": {
                "files": self._listening.files,
                "tokens": self._lessons.tokens,
                "seed": self._lessons.seed,
            },
            "accepted": [round(rate, 4) for rate in accepted],
            "steps": outcome.steps,
        }
        return write_manifest(
            self._path, source=self._place, recipe=recipe, method="search", details=details
        )


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
