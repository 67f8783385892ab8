"""A model that learns to predict as its original does, end to end, on the grid that ships.

The loss is KL(original || model) over the whole vocabulary, of every row that counts; for a task of
one's own it is mixed with -log p of what should be said, in what is held out too. While it learns,
what a row counts is bounded by what was the mean on the held out before (`divergence.py`): so the
same tokens bring it nearer; and errors of the final states count by their metric (`fisher.py`). Not
beside a task, which must not take a model away unboundedly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.training.divergence import divergence
from halfbyte.training.fisher import STATES, Hold
from halfbyte.training.loop import Learned
from halfbyte.training.order import Order
from halfbyte.training.samples import Samples
from halfbyte.training.student import Student
from halfbyte.training.teacher import Teacher

LEAST = 1e-6  # nats


@dataclass(frozen=True, slots=True)
class Lesson:
    """Windows, and what the original makes of them."""

    samples: Samples
    teacher: Teacher


class Distillation:
    """A task for the training loop. `at_once` windows go through the model at a time.

    `hold` adds to what they say what was known before. `metric` M [H, H]: an error d of a row's
    final states costs d^T M d / 2 beside the loss.

    It is made while the parameters are those that the training begins with, also where it then goes
    on later: what a row counts is measured by them.
    """

    def __init__(
        self,
        student: Student,
        lesson: Lesson,
        held: Lesson,
        order: Order,
        *,
        at_once: int,
        hold: Hold | None = None,
        metric: Tensor | None = None,
    ) -> None:
        self._student, self._lesson, self._held = student, lesson, held
        self._order, self._at_once = order, at_once
        self._hold, self._metric = hold, metric
        task = any(each.samples.supervised.any() for each in (lesson, held))
        self._typical = None if task else max(self.measure(), LEAST)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._student.tensors.parameters

    def learn(self, step: int) -> Learned:
        index = self._order.of(step)
        self._student.tensors.clear_gradients()
        total = float(self._lesson.samples.weights[index].sum())
        loss = 0.0
        for part in self._parts(index):
            share = float(self._lesson.samples.weights[part].sum()) / total
            found = self._loss(self._lesson, part, learning=True) * share
            found.backward()
            loss += float(found.detach())
        if self._hold is not None:
            self._hold.pull()
        return Learned(loss=loss, tokens=len(index) * self._lesson.samples.length)

    @torch.no_grad()
    def measure(self) -> float:
        weights = self._held.samples.weights
        parts = self._parts(range(len(weights)))
        sums = [float(self._loss(self._held, p)) * float(weights[p].sum()) for p in parts]
        return sum(sums) / float(weights.sum())

    def _loss(self, lesson: Lesson, index: list[int], *, learning: bool = False) -> Tensor:
        states, head = self._student.states(lesson.samples.inputs(index))
        samples, wanted = lesson.samples, lesson.teacher.states(index)
        rows = self._rows(samples.weights[index])
        targets, shares = None, None
        if samples.supervised[index].any():
            targets = self._rows(samples.token_ids[index, 1:])
            shares = self._rows(samples.supervised[index]).repeat_interleave(samples.length)
        return divergence(
            states,
            head,
            lesson.teacher.logits(wanted),
            rows,
            softcap=self._student.spec.logit_softcap,
            targets=targets,
            shares=shares,
            typical=self._typical if learning else None,
            beside=self._weighed(states.detach(), wanted, rows) if learning else None,
        )

    def _weighed(self, states: Tensor, wanted: Tensor, rows: Tensor) -> Tensor | None:
        """The gradient at states [R, H] of what their errors cost."""
        if self._metric is None:
            return None
        return (states - wanted).mul_(STATES / rows.sum() * rows[:, None]) @ self._metric

    def _rows(self, numbers: NDArray[Any]) -> Tensor:
        return torch.from_numpy(numbers).flatten().to(self._student.ops.device)

    def _parts(self, index: Sequence[int]) -> list[list[int]]:
        return [
            [*index[start : start + self._at_once]] for start in range(0, len(index), self._at_once)
        ]
