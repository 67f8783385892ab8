"""How a training went, for people: the loss and the held-out measure over the steps.

Kept beside the run, a line for every measurement, so that a run that was stopped keeps its past;
where one is resumed before its last line, the later lines are written again. What moved is found at
the end, from what was stored before and after.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte.numerics.codec import decode, integers_of
from halfbyte.numerics.qtensor import QTensor
from halfbyte.training.grid import trainable
from halfbyte.training.loop import Standing, Tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """Behind `step` steps: the loss, smoothed, and the held-out measure."""

    step: int
    loss: float
    measure: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One tensor: how far its weights went, relative to their size (root mean squares), and the
    share of its integers that are others now (None where it has none)."""

    name: str
    moved: float
    flipped: float | None


class Curve:
    """The marks of one run, in a file. `every` is how often it is measured."""

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every

    def told(self, others: Tell) -> Tell:
        """Keeps the marks of what it is told, and tells others."""

        def tell(standing: Standing) -> None:
            if standing.step % self._every == 0 or standing.step == standing.steps:
                mark = Mark(step=standing.step, loss=standing.loss, measure=standing.measure)
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(mark)) + "\n")
            others(standing)

        return tell

    def marks(self) -> list[Mark]:
        """In order; of a step that came twice, the last."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").splitlines()
        found = {fields["step"]: Mark(**fields) for fields in map(_parsed, lines) if fields}
        return [found[step] for step in sorted(found)]


def movements(
    before: Mapping[str, QTensor], after: Iterator[tuple[str, QTensor]]
) -> Sequence[Moved]:
    """Of every tensor that changed."""
    found: list[Moved] = []
    for name, q in after:
        old = before[name]
        if old.data.tobytes() == q.data.tobytes():
            continue
        first, last = decode(old), decode(q)
        moved = (last - first).norm() / first.norm().clamp(min=torch.finfo(torch.float32).tiny)
        flipped = None
        if trainable(q.scheme):
            flipped = float((integers_of(old)[0] != integers_of(q)[0]).float().mean())
        found.append(Moved(name=name, moved=float(moved), flipped=flipped))
    return found


def _parsed(line: str) -> dict[str, Any]:
    """A line that was cut off by a kill says nothing."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
