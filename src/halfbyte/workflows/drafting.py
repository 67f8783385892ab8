"""Making a drafter for a target: what it says is collected, learned, quantized and checked."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte import env
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.formats.checkpoint import Source, write_gguf
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.jobs import claim
from halfbyte.formats.manifest import weights_hash, write_manifest
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import drafter_beside, locate
from halfbyte.kernels.choice import choose, oracle
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.planner.probe import this_machine
from halfbyte.quantizer.opening import open_source
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import AUTO, ModelSpec, SamplingParams, paired_layers, recipe_of
from halfbyte.training.adamw import AdamW
from halfbyte.training.beginnings import beginning, first_copied, shape
from halfbyte.training.drafting import DraftTask, Teaching, held_out
from halfbyte.training.entry import fitted_entry
from halfbyte.training.loop import Outcome, Regimen, Tell, train
from halfbyte.training.passages import Author, Library, Passage
from halfbyte.training.schedule import Schedule
from halfbyte.training.seen import RowLayout, Seen
from halfbyte.training.tensors import Tensors, weights_of
from halfbyte.workflows.artefacts import size_of

SHORTEST = 3  # tokens of an answer that drafts can be learned from
RECIPES = ("q4_0", "q8_0")  # the smallest first
TOLERATED = 0.01  # of the accepted drafts that a smaller drafter may lose
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What a drafter is taught on: files, so many tokens of what the target says and of texts, in
    windows of up to `window` tokens and answers of up to `longest`."""

    files: Sequence[Path]
    tokens: int = 400_000
    window: int = 512
    longest: int = 192
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a new drafter is like; what is None is chosen by the target's size. `shortlist` are the
    tokens that its head has. `start`: a drafter to go on from, "auto" the one beside the target,
    "none" to begin anew."""

    layers: int | None = None
    hidden: int | None = None
    width: int | None = None
    shortlist: Sequence[int] | None = None
    start: str = AUTO
    own_head: bool = False


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

    def __init__(
        self,
        model: str,
        target: Path,
        *,
        lessons: Lessons,
        build: Build,
        course: Course,
        device: str = AUTO,
        threads: int | None = None,
    ) -> None:
        self._place = locate(model)
        if target.suffix != ".gguf":
            raise InvalidInputError("a drafter is written as X.gguf", where=target)
        self._path = target
        self._folder = target.with_name(f"{target.name}.work")
        self._lessons, self._build, self._course = lessons, build, course
        self._device, self._threads = device, threads
        self._source = open_source(str(self._place))
        if self._source.assets is None:
            raise InvalidInputError("has no tokenizer to read texts with", where=self._place)
        if lessons.window > self._source.spec.context:
            raise InvalidInputError(
                f"is beyond the context of {self._source.spec.context} tokens", where="--window"
            )
        self._library = Library(self._source.assets, window=lessons.window, seed=lessons.seed)
        self._begun: Path | None = None
        start = self._start_from = self._start()
        self.spec = self._shape() if start is None else self._renewed(start.spec)

    def _start(self) -> Source | None:
        """The drafter to go on from. One only found beside the target may be of another shape."""
        if self._build.start == NONE:
            return None
        named = self._build.start != AUTO
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
                "the target's weights": sum(
                    min(4 * tensor.count, 2**30)
                    if tensor.name != target.head_name
                    else 4 * tensor.count
                    for tensor in target.tensors()
                ),
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

    def passages(self, progress: Progress | None) -> list[Passage]:
        """What is learned from: texts, and what the target says, in equal shares of the files."""
        lessons, found = self._lessons, list[Passage]()
        ops = choose(self._source.spec, self._device, threads=self._threads)
        author = Author(
            load(self._source, ops),
            sampling=self._sampling(),
            library=self._library,
            longest=lessons.longest,
            folder=self._answers(),
        )
        each = lessons.tokens // len(lessons.files)
        for number, path in enumerate(lessons.files):
            wanted, texts = each, [*_up_to(self._library.texts(path), each // 2)]
            wanted -= sum(text.learned for text in texts)
            answers = author.answers(
                self._library.prompts(path),
                f"{path.name}-{_sha256(path)[:12]}",
                wanted,
                _part(progress, number, len(lessons.files)),
            )
            found += [*texts, *(it for it in answers if it.learned >= SHORTEST)]
        return found

    def _sampling(self) -> SamplingParams:
        """As the model's makers advise."""
        assert self._source.assets is not None
        own = self._source.assets.generation
        return SamplingParams(
            temperature=own.temperature or 1.0,
            top_k=own.top_k or 0,
            top_p=own.top_p or 1.0,
            min_p=own.min_p or 0.0,
            seed=self._lessons.seed,
            suppress=frozenset(own.suppress_ids),
        )

    def _answers(self) -> Path:
        """Where the target's answers are kept, for other drafters too."""
        lessons = self._lessons
        facts = [weights_hash(self._place), lessons.window, lessons.longest, lessons.seed]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        folder = env.cache_dir() / "answers" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def run(self, passages: Sequence[Passage], *, seeing: Progress | None, tell: Tell) -> Trained:
        """Teach it, quantize it, and write it with its manifest."""
        target = load(self._source, oracle(self._source.spec, self._device, threads=self._threads))
        apart = held_out(passages)
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
        learned = Tensors(spec=self.spec, weights=dict(task.weights))
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
                "files": {path.name: _sha256(path) for path in self._lessons.files},
                "tokens": self._lessons.tokens,
                "seed": self._lessons.seed,
            },
            "accepted": [round(rate, 4) for rate in accepted],
            "steps": outcome.steps,
        }
        return write_manifest(
            self._path, source=self._place, recipe=recipe, method="search", details=details
        )


def _up_to(passages: Iterator[Passage], tokens: int) -> Iterator[Passage]:
    """The first of the passages, with so many tokens to learn, about."""
    while tokens > 0 and (passage := next(passages, None)) is not None:
        tokens -= passage.learned
        yield passage


def _part(progress: Progress | None, number: int, count: int) -> Progress | None:
    """The progress of one of several parts of equal size."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
