"""Measuring a model on texts and tasks, alone or against the reference it was made from.

The reference goes first: its final states are kept (`evals/reference.py`), its answers remembered,
and it is out of memory when the model runs. A second measurement does not read the texts with it
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals.chats import read_chats
from halfbyte.evals.diagnose import diagnose, differences
from halfbyte.evals.fidelity import Fidelity, measure
from halfbyte.evals.gate import Check, Gate, checks, default_gate
from halfbyte.evals.reference import Baseline, Reference
from halfbyte.evals.remedies import Making, remedies
from halfbyte.evals.tasks import Task
from halfbyte.evals.tasks.outcome import Outcome, TaskResult, summarize
from halfbyte.evals.tasks.subject import Subject
from halfbyte.evals.texts import OWN_TEXTS, Reading, Window, cut, read_text
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.manifest import described, record
from halfbyte.formats.progress import Progress
from halfbyte.formats.reference import locate
from halfbyte.kernels.choice import choose, oracle
from halfbyte.kernels.contract import OpSet
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import load
from halfbyte.quantizer.opening import open_source
from halfbyte.specs import LoadOptions
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.workflows.artefacts import name_of
from halfbyte.workflows.merging import original

CHATS = ".jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A task by the name it is reported under; `kind` says what it is."""

    name: str
    kind: str
    task: Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found on texts, read like this, and on tasks, in the op set of that name."""

    ops: str
    reading: Reading
    texts: Sequence[Fidelity]
    tasks: Sequence[TaskResult] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a gate says: all that it asked, what differs from the reference and fails a strict
    one, and after a miss the likely causes and what would help."""

    passed: bool
    checks: Sequence[Check]
    differing: Sequence[str]
    causes: Sequence[str] = field(default_factory=list[str])
    remedies: Sequence[str] = field(default_factory=list[str])

    @property
    def misses(self) -> list[Check]:
        return [check for check in self.checks if not check.kept]


class Evaluation:
    """A model opened to be measured, beside its reference if `against` names one.

    The reference is read as it is stored, and on texts computes in f32; its tokenizer and template
    serve both. `lora`: the model with that adapter; `merged`: adapters merged into the reference.
    Opening reads headers only.
    """

    def __init__(
        self,
        model: str,
        *,
        against: str | None = None,
        options: LoadOptions | None = None,
        lora: str | None = None,
        merged: Sequence[str] = (),
    ) -> None:
        self.options = options or LoadOptions()
        self.place = locate(model)
        self.source = open_source(model, recipe=self.options.recipe, method=self.options.method)
        self.against = None if against is None else locate(against)
        self._original = None if self.against is None else original(self.against, merged)
        self.base = None if self._original is None else self._original.source
        self.name = _called(model)
        self.base_name: str | None = None
        self.reference_flags = ""  # that name the reference on a command line
        if against is not None and self._original is not None:
            self.base_name = self._original.called(_called(against))
            flags = [("against", _called(against)), *(("against-lora", it) for it in merged)]
            self.reference_flags = " ".join(f"--{flag} {name}" for flag, name in flags)
        self._adapters = {} if lora is None else {lora: open_adapter(lora, self.source.spec)}
        assets = (self.base.assets if self.base else None) or self.source.assets
        if assets is None:
            raise InvalidInputError("neither model has a tokenizer", where=model)
        self._assets = assets

    @property
    def own_texts(self) -> dict[str, Path]:
        """Our own short texts, and the conversations among them for a model that has a template."""
        chats = self._assets.template is not None
        return {n: path for n, path in OWN_TEXTS.items() if chats or path.suffix != CHATS}

    def windows(self, path: Path, reading: Reading) -> list[Window]:
        """A text as the windows that are read of it; of a .jsonl file those of the answers."""
        if path.suffix == CHATS:
            chat = Chat(self._tokenizer, self._assets)
            return read_chats(path, chat, self._tokenizer, reading)
        return cut(read_text(path, self._tokenizer), reading)

    def measure(
        self,
        texts: Mapping[str, Path],
        reading: Reading,
        tasks: Sequence[Asked] = (),
        progress: Progress | None = None,
    ) -> Measured:
        """Measure on texts by name, and on tasks; of a .jsonl file the answers count.

        Raises `InvalidInputError` where the texts or the two models do not fit.
        """
        windows = [self.windows(path, reading) for path in texts.values()]
        baselines = self._baselines(windows, progress)
        theirs = self._reference_outcomes(tasks, progress)
        found = [
            measure(
                self._decoder,
                text,
                name=name,
                reference=baseline,
                kv=self.options.kv,
                progress=progress,
            )
            for name, text, baseline in zip(texts, windows, baselines, strict=True)
        ]
        done = self._outcomes(self._decoder, tasks, theirs, progress)
        results = [
            summarize(asked.name, asked.kind, ours, their)
            for asked, ours, their in zip(tasks, done, theirs, strict=True)
        ]
        return Measured(ops=self._decoder.ops.name, reading=reading, texts=found, tasks=results)

    def default_gate(self) -> Gate:
        """Thresholds for how the model is stored."""
        return default_gate(self.source.spec, self.source.schemes)

    def differences(self) -> list[str]:
        """What the two say of themselves that should be the same."""
        return [] if self.base is None else differences(self.source, self.base)

    def judge(self, gate: Gate, measured: Measured, *, strict: bool) -> Verdict:
        """Hold what was measured to a gate. `strict`: a model that describes itself otherwise than
        its reference misses, too. After a miss the weights are read again, for its causes."""
        asked = checks(gate, measured.texts, measured.tasks)
        missed = [check for check in asked if not check.kept]
        differing = self.differences()
        passed = not missed and not (strict and differing)
        verdict = Verdict(passed=passed, checks=asked, differing=differing)
        if passed or self.base is None:
            return verdict
        found = diagnose(self.source, self.base, measured.texts)
        helps = [] if found.at_fault else remedies(self._making(), missed)
        return replace(verdict, causes=found.causes, remedies=helps)

    def keep(self, measured: Measured, gate: str, verdict: Verdict) -> None:
        """Write it all into the manifest of the model, if it has one that may be written to.

        A model that is quantized on the way has none, and one with an adapter is another.
        """
        if not described(self.place) or self.options.recipe or self._adapters:
            return
        judged = {"name": gate, "passed": verdict.passed, "misses": [*map(asdict, verdict.misses)]}
        facts = {**asdict(measured), "kv": self.options.kv, "gate": judged}
        if self.against is not None:
            facts["against"] = {"name": self.base_name, "weights": self._reference_hash}
        with suppress(InvalidInputError):
            record(self.place, facts)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._assets)

    @cached_property
    def _decoder(self) -> Decoder:
        return load(self.source, self._ops(self.source), adapters=self._adapters)

    def _ops(self, source: Source) -> OpSet:
        options = self.options
        return choose(source.spec, options.device, options.dtype, threads=options.threads)

    @cached_property
    def _reference_hash(self) -> str:
        assert self._original is not None
        return self._original.weights()

    def _baselines(
        self, texts: Sequence[Sequence[Window]], progress: Progress | None
    ) -> Sequence[Baseline | None]:
        if self.base is None or not texts:
            return [None] * len(texts)
        ops = oracle(self.base.spec, self.options.device, threads=self.options.threads)
        return Reference(self.base, ops, weights=self._reference_hash).read(texts, progress)

    def _reference_outcomes(
        self, tasks: Sequence[Asked], progress: Progress | None
    ) -> Sequence[Sequence[Outcome] | None]:
        """Of each task, if there is a reference; it runs as the model does, and is let go."""
        nothing = [None] * len(tasks)
        if self.base is None or not tasks:
            return nothing
        return self._outcomes(load(self.base, self._ops(self.base)), tasks, nothing, progress)

    def _outcomes(
        self,
        decoder: Decoder,
        tasks: Sequence[Asked],
        theirs: Sequence[Sequence[Outcome] | None],
        progress: Progress | None,
    ) -> list[list[Outcome]]:
        subject = Subject(decoder, self._assets, self.options.kv)
        found: list[list[Outcome]] = []
        for asked, their in zip(tasks, theirs, strict=True):
            found.append(asked.task.run(subject, their))
            if progress is not None:
                progress(len(found), len(tasks))
        return found

    def _making(self) -> Making:
        return Making(
            spec=self.source.spec,
            schemes=self.source.schemes,
            kv=self.options.kv,
            rounds_activations=self.options.dtype != "f32",
            method=self.options.method
            if self.options.recipe
            else described(self.place).get("method"),
        )


def _called(reference: str) -> str:
    """A model by a name that says nothing of where it lies."""
    path = Path(reference).expanduser()
    return name_of(path) if path.exists() else reference
