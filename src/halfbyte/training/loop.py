"""The one training loop: steps, a held-out measure, checkpoints; the best is what remains.

A run may be killed at any moment and goes on at its last checkpoint; it ends in the same bits as a
run that was never stopped, because a step is a function of the parameters, the optimizer's state
and its number. What must be random in a task comes from its seed and the step (`order.Order`).

What is left in the parameters at the end are those of the best held-out measure, the beginning
included: training never makes anything worse. A run that diverges (a loss that is no number, a
measure twice the best) stops there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from time import monotonic
from typing import Literal, Protocol

import torch
from torch import Tensor

from halfbyte.formats.jobs import Job, claim
from halfbyte.training.checkpoints import restore, save
from halfbyte.training.schedule import Schedule

STATE, BEST = "state.npz", "best.npz"
DIVERGED = 2.0
SMOOTH = 0.95


@dataclass(frozen=True, slots=True)
class Learned:
    """The mean loss of a step, and the tokens it was taken over."""

    loss: float
    tokens: int


class Task(Protocol):
    """What is trained. `parameters` are leaves with gradients, by name."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def learn(self, step: int) -> Learned:
        """Adds the gradients of a step's batch to the parameters'; the same for the same step."""
        ...

    def measure(self) -> float:
        """How bad it is on what is held out: not negative, 0 is perfect."""
        ...


class Optimizer(Protocol):
    """Moves parameters by their gradients. `state` is all that it remembers, by name."""

    @property
    def state(self) -> Mapping[str, Tensor]: ...

    def step(self, index: int, rate: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Regimen:
    """How it is trained. `clip` bounds the norm of all gradients together; every `measure_every`
    steps, and at both ends, it is measured; about every `save_every_s` seconds it is saved."""

    schedule: Schedule
    clip: float = 1.0
    measure_every: int = 100
    save_every_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a run stands after `step` of `steps`: the loss smoothed over some 20 steps, the last
    held-out measure and the best, tokens per second of this process, and the seconds left."""

    step: int
    steps: int
    loss: float
    measure: float
    best: float
    tokens_per_s: float
    left_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended: what it measured `before` and at best, at which step, over how many tokens;
    `seconds` of all its processes up to their last checkpoints."""

    ended: Literal["done", "diverged"]
    steps: int
    before: float
    best: float
    best_step: int
    tokens: int
    seconds: float


Tell = Callable[[Standing], None]


def train(
    task: Task, optimizer: Optimizer, regimen: Regimen, folder: Path, *, job: Job, tell: Tell
) -> Outcome:
    """Train to the end, or go on where `folder` says; the folder stays, and is the caller's.

    `job` is all that decides the result; a folder of another job is emptied.
    """
    claim(folder, job)
    return _Run(task, optimizer, regimen, folder, tell).run()


class _Run:
    def __init__(
        self, task: Task, optimizer: Optimizer, regimen: Regimen, folder: Path, tell: Tell
    ) -> None:
        self._task, self._optimizer, self._regimen = task, optimizer, regimen
        self._state, self._best = folder / STATE, folder / BEST
        self._tell = tell
        self._step = self._best_step = self._tokens = 0
        self._loss = self._measure = self._before = self._lowest = inf
        self._seconds = 0.0  # of processes before this one
        self._began = self._saved = monotonic()
        self._first = self._tokens_before = 0  # where this process began

    def run(self) -> Outcome:
        if self._state.exists():
            self._resume()
        else:
            self._measured()
        ended: Literal["done", "diverged"] = "done"
        while self._step < self._regimen.schedule.steps:
            if not self._advance():
                ended = "diverged"
                break
        restore(self._best, self._task.parameters)
        return Outcome(
            ended=ended,
            steps=self._step,
            before=self._before,
            best=self._lowest,
            best_step=self._best_step,
            tokens=self._tokens,
            seconds=self._seconds + monotonic() - self._began,
        )

    def _advance(self) -> bool:
        """One step; False if it diverged."""
        parameters = self._task.parameters
        for parameter in parameters.values():
            parameter.grad = None
        learned = self._task.learn(self._step)
        if not isfinite(learned.loss) or not _clip(parameters, self._regimen.clip):
            return False
        schedule = self._regimen.schedule
        self._optimizer.step(self._step, schedule.at(self._step))
        self._step += 1
        self._tokens += learned.tokens
        before = learned.loss if self._loss == inf else self._loss
        self._loss = SMOOTH * before + (1 - SMOOTH) * learned.loss
        last = self._step == schedule.steps
        if (last or self._step % self._regimen.measure_every == 0) and not self._measured():
            return False
        if last or monotonic() - self._saved >= self._regimen.save_every_s:
            self._save()
        self._tell(self._standing())
        return True

    def _measured(self) -> bool:
        """Measures, and keeps the best; False if it diverged."""
        self._measure = self._task.measure()
        if self._step == 0:
            self._before = self._measure
        if self._measure < self._lowest:
            self._lowest, self._best_step = self._measure, self._step
            save(self._best, self._task.parameters, {"step": self._step})
        return self._measure <= DIVERGED * self._lowest

    @property
    def _everything(self) -> dict[str, Tensor]:
        found = {f"parameter.{name}": it for name, it in self._task.parameters.items()}
        return found | {f"optimizer.{name}": it for name, it in self._optimizer.state.items()}

    def _save(self) -> None:
        self._saved = monotonic()
        facts = {
            "step": self._step,
            "tokens": self._tokens,
            "seconds": self._seconds + self._saved - self._began,
            "loss": self._loss,
            "measure": self._measure,
            "before": self._before,
            "lowest": self._lowest,
            "best_step": self._best_step,
        }
        save(self._state, self._everything, facts)

    def _resume(self) -> None:
        facts = restore(self._state, self._everything)
        self._step = self._first = int(facts["step"])
        self._best_step = int(facts["best_step"])
        self._tokens = self._tokens_before = int(facts["tokens"])
        self._seconds, self._loss = facts["seconds"], facts["loss"]
        self._measure, self._before, self._lowest = (
            facts[name] for name in ("measure", "before", "lowest")
        )

    def _standing(self) -> Standing:
        steps, spent = self._regimen.schedule.steps, monotonic() - self._began
        tokens, done = self._tokens - self._tokens_before, self._step - self._first
        return Standing(
            step=self._step,
            steps=steps,
            loss=self._loss,
            measure=self._measure,
            best=self._lowest,
            tokens_per_s=tokens / spent if spent else 0.0,
            left_s=spent * (steps - self._step) / done,
        )


def _clip(parameters: Mapping[str, Tensor], bound: float) -> bool:
    """Scales the gradients down to a norm of `bound`, all together; False if that is no number."""
    gradients = [it.grad for it in parameters.values() if it.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    if not bool(norm.isfinite()):
        return False
    scale = min(1.0, bound / max(float(norm), 1e-12))
    if scale < 1.0:
        for gradient in gradients:
            gradient.mul_(scale)
    return True
