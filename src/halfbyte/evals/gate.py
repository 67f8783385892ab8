"""A gate: thresholds on what was measured, from a TOML file or our own, and what misses them.

    max_kl_mean = 0.02              # of every text
    min_same_top1 = 0.92
    max_perplexity_increase = 0.03  # a fraction: 3 %

    [text.chinese]                  # of this text, in place of those
    max_kl_mean = 0.03

    [task.arc_easy]
    max_flip_rate = 0.05
    max_score_drop = 0.02

Our own (`default_gate`) follow from how the weights are stored, since what is a disaster in f32 is
the rounding of q4_0. A number that is not a number misses. Nothing is raised for a miss: what to
do about one is decided upstairs.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.tasks.outcome import TaskResult
from halfbyte.specs import ModelSpec, Scheme

Thresholds = Mapping[str, float]

# What a text may be held to; a task has numbers of its own besides these two kinds of threshold.
TEXT_THRESHOLDS = (
    "max_perplexity",
    "max_perplexity_increase",
    "max_kl_mean",
    "max_kl_median",
    "max_kl_p90",
    "max_kl_p99",
    "max_kl_p999",
    "max_kl_max",
    "min_same_top1",
    "max_right_token_drop",
    "max_right_token_rms",
)
LIMITS = ("max_", "min_")

# Least bits per weight of the layers, and of the head; then max_kl_mean, min_same_top1,
# max_perplexity_increase. For 8 and 4 bits they lie a little beyond what a sound model of 8 million
# parameters measures on the worst of our own texts; the others follow the square of the rounding
# error between them. They stop disasters: a larger model measures a fraction, and deserves a gate
# of its own.
DEFAULTS = (
    (16.0, 0.0, 0.001, 0.97, 0.005),
    (8.0, 0.0, 0.003, 0.93, 0.02),
    (6.5, 0.0, 0.012, 0.88, 0.04),
    (5.0, 0.0, 0.04, 0.80, 0.08),
    (4.5, 6.0, 0.13, 0.70, 0.16),
    (4.5, 0.0, 0.20, 0.62, 0.24),
    (4.0, 6.0, 0.20, 0.62, 0.24),
    (4.0, 0.0, 0.30, 0.55, 0.35),
    (0.0, 0.0, 0.60, 0.40, 0.80),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Thresholds of every text, and of single texts and tasks by name."""

    every: Thresholds = field(default_factory=dict[str, float])
    texts: Mapping[str, Thresholds] = field(default_factory=dict[str, Thresholds])
    tasks: Mapping[str, Thresholds] = field(default_factory=dict[str, Thresholds])

    def of_text(self, name: str) -> dict[str, float]:
        """The thresholds of a text."""
        return {**self.every, **self.texts.get(name, {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One threshold: `number` of a text or task was `measured`; `kept` says on which side."""

    text: str
    number: str
    limit: Literal["max", "min"]
    threshold: float
    measured: float

    @property
    def kept(self) -> bool:
        if self.limit == "max":
            return self.measured <= self.threshold
        return self.measured >= self.threshold

    @property
    def sentence(self) -> str:
        """Which number where, and by how much it misses."""
        beyond = abs(self.measured - self.threshold)
        return (
            f"{self.number} on {self.text} is {self.measured:.4g}, "
            f"{beyond:.2g} beyond {self.threshold:g}"
        )


def read_gate(path: Path) -> Gate:
    """The gate of a file; `InvalidInputError` says what in it is none."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError(f"not a gate file: {error}", where=path) from error
    every = {name: value for name, value in document.items() if name not in ("text", "task")}
    gate = Gate(
        every=_thresholds(every, path, TEXT_THRESHOLDS),
        texts=_tables(document.get("text", {}), path, TEXT_THRESHOLDS),
        tasks=_tables(document.get("task", {}), path, None),
    )
    if not gate.every and not gate.texts and not gate.tasks:
        raise InvalidInputError("has no thresholds, so nothing could miss it", where=path)
    return gate


def _tables(value: Any, path: Path, known: Sequence[str] | None) -> dict[str, Thresholds]:
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        raise InvalidInputError("text and task are tables: [text.NAME], [task.NAME]", where=path)
    tables = cast("dict[str, dict[str, Any]]", value)
    return {name: _thresholds(table, path, known) for name, table in tables.items()}


def _thresholds(
    table: Mapping[str, Any], path: Path, known: Sequence[str] | None
) -> dict[str, float]:
    for name, value in table.items():
        is_known = name.startswith(LIMITS) if known is None else name in known
        if not is_known or isinstance(value, bool) or not isinstance(value, int | float):
            names = "max_... or min_..." if known is None else ", ".join(known)
            raise InvalidInputError(
                f"'{name} = {value}' is no threshold", where=path, hint=f"a number for {names}"
            )
    return {name: float(value) for name, value in table.items()}


def default_gate(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> Gate:
    """Thresholds for a model stored like this: by the scheme that most weights of its layers have,
    and by that of its head."""
    weights: Counter[Scheme] = Counter()
    for tensor in spec.tensors():
        if tensor.name.startswith("layers."):
            weights[schemes[tensor.name]] += tensor.count
    bits = weights.most_common(1)[0][0].bits
    head = schemes[spec.head_name].bits
    row = next(row for row in DEFAULTS if bits >= row[0] and head >= row[1])
    names = ("max_kl_mean", "min_same_top1", "max_perplexity_increase")
    return Gate(every=dict(zip(names, row[2:], strict=True)))


def checks(gate: Gate, texts: Sequence[Fidelity], tasks: Sequence[TaskResult] = ()) -> list[Check]:
    """All that a gate asks, in the order of the texts, the tasks and the thresholds.

    Raises `InvalidInputError` for a threshold on what was not measured, or can only be measured
    beside a reference.
    """
    _check_names(gate.texts, [text.name for text in texts], "text")
    _check_names(gate.tasks, [task.name for task in tasks], "task")
    found: list[Check] = []
    for text in texts:
        found += _checked(text.name, gate.of_text(text.name), _of_text(text))
    for task in tasks:
        found += _checked(task.name, gate.tasks.get(task.name, {}), _of_task(task))
    return found


def misses(gate: Gate, texts: Sequence[Fidelity], tasks: Sequence[TaskResult] = ()) -> list[Check]:
    """The checks that are not kept."""
    return [check for check in checks(gate, texts, tasks) if not check.kept]


def _check_names(wanted: Mapping[str, Thresholds], measured: Sequence[str], kind: str) -> None:
    for name in wanted:
        if name not in measured:
            raise InvalidInputError(
                f"the gate asks for the {kind} '{name}', which was not measured",
                hint=f"--{kind} ..., or without [{kind}.{name}] in the gate",
            )


def _checked(name: str, thresholds: Thresholds, numbers: Mapping[str, float]) -> Iterator[Check]:
    for wanted, threshold in thresholds.items():
        limit, number = wanted[:3], wanted[4:]
        if number not in numbers:
            raise InvalidInputError(
                f"the gate asks for {wanted} of {name}, which was not measured",
                hint=f"--against a reference; measured were {', '.join(numbers)}",
            )
        yield Check(
            text=name,
            number=number,
            limit="max" if limit == "max" else "min",
            threshold=threshold,
            measured=numbers[number],
        )


def _of_text(text: Fidelity) -> dict[str, float]:
    numbers = {"perplexity": text.perplexity}
    if text.kl is None or text.right_token is None:
        return numbers
    return numbers | {
        "perplexity_increase": (text.perplexity_ratio or 0.0) - 1,
        "same_top1": text.same_top1 or 0.0,
        "right_token_drop": -text.right_token.mean,
        "right_token_rms": text.right_token.rms,
        **{f"kl_{name}": value for name, value in asdict(text.kl).items()},
    }


def _of_task(task: TaskResult) -> dict[str, float]:
    numbers = {"score": task.score, **task.numbers}
    if task.flips is None or task.reference_score is None:
        return numbers
    return numbers | {
        "score_drop": task.reference_score - task.score,
        "flip_rate": task.flips.rate,
        "changed_answers": task.flips.changed_answers,
    }
