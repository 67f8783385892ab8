"""What a report says of a model, as values; nothing here knows how it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.gate import Check
from halfbyte.evals.layers import LayerError
from halfbyte.evals.tasks.outcome import TaskResult
from halfbyte.evals.texts import Reading
from halfbyte.specs import ModelSpec, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """All tensors of one scheme: how many, how many weights, how many bytes."""

    scheme: str
    bits: float
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A model among others: its size in bytes, and its mean KL over the texts."""

    name: str
    bytes: int
    kl: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Movement:
    """The tensors of one part of the model: how far their weights went in a training, relative to
    their size, and the share of their integers that are others now; means over the tensors."""

    part: str
    moved: float
    flipped: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """How a training went: (steps, held-out measure), in order, and what moved."""

    curve: Sequence[tuple[int, float]]
    movements: Sequence[Movement]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Of a model `name` that was made from `base`.

    `front` is the predicted (bytes, KL) of the best choices that were weighed, if any were.
    `passed` is None where no gate was asked; `checks` are all that it asked. `files` and
    `base_files` are SHA-256 by file name. `commands` make it, and measure it, again.
    `training` tells of one, if it was trained.
    """

    name: str
    base: str
    version: str
    recipe: str
    method: str
    parameters: int
    bytes: int
    base_bytes: int
    stored: Sequence[Stored]
    layers: Sequence[LayerError]
    ops: str
    kv: str
    reading: Reading
    texts: Sequence[Fidelity]
    tasks: Sequence[TaskResult]
    points: Sequence[Point]
    front: Sequence[tuple[int, float]]
    passed: bool | None
    checks: Sequence[Check]
    causes: Sequence[str]
    remedies: Sequence[str]
    files: Mapping[str, str]
    base_files: Mapping[str, str]
    commands: Sequence[str]
    training: TrainingFacts | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


def stored_as(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> list[Stored]:
    """What is stored how, the most bytes first."""
    tensors, weights, sizes = Counter[Scheme](), Counter[Scheme](), Counter[Scheme]()
    for tensor in spec.tensors():
        scheme = schemes[tensor.name]
        tensors[scheme] += 1
        weights[scheme] += tensor.count
        sizes[scheme] += scheme.bytes(tensor.shape)
    return [
        Stored(
            scheme=scheme.name,
            bits=8 * size / weights[scheme],
            tensors=tensors[scheme],
            weights=weights[scheme],
            bytes=size,
        )
        for scheme, size in sizes.most_common()
    ]


def mean_kl(texts: Sequence[Fidelity]) -> float:
    """Over all scored tokens of the texts that have one; 0 where none has."""
    known = [(text.kl.mean, text.tokens) for text in texts if text.kl is not None]
    tokens = sum(count for _, count in known)
    return sum(mean * count for mean, count in known) / tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class GateTable:
    """Texts or tasks of which a gate asked the same `numbers`, each with its checks."""

    numbers: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Check]]]


def gate_tables(checks: Sequence[Check]) -> list[GateTable]:
    """All that a gate asked, as few tables as it can be."""
    by_name: dict[str, list[Check]] = {}
    for check in checks:
        by_name.setdefault(check.text, []).append(check)
    tables: dict[tuple[str, ...], list[tuple[str, Sequence[Check]]]] = {}
    for name, asked in by_name.items():
        tables.setdefault(tuple(check.number for check in asked), []).append((name, asked))
    return [GateTable(numbers, rows) for numbers, rows in tables.items()]
