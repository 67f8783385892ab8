"""A small job for the training loop, which can be run as a program, and killed.

python training_job.py FOLDER STEPS RESULT [SECONDS_PER_STEP]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from time import sleep

import torch
from torch import Tensor

from halfbyte.training.adamw import AdamW
from halfbyte.training.checkpoints import save
from halfbyte.training.loop import Learned, Outcome, Regimen, Tell, train
from halfbyte.training.order import Order
from halfbyte.training.schedule import Schedule


class Fitting:
    """Fits a small network to another one; `spoil` makes the loss of a step no number."""

    def __init__(self, *, spoil: int | None = None, pause: float = 0.0) -> None:
        chance = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=chance)

        truth = {"a": normal(16, 8) / 3, "b": normal(16), "c": normal(4, 16) / 4}
        self._x, self._held = normal(256, 8), normal(64, 8)
        self._y, self._wanted = _network(truth, self._x), _network(truth, self._held)
        self._made = {
            "a": (normal(16, 8) / 3).requires_grad_(),
            "b": torch.zeros(16).requires_grad_(),
            "c": (normal(4, 16) / 4).requires_grad_(),
        }
        self._order = Order(count=256, batch=48, seed=5)
        self._spoil, self._pause = spoil, pause

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._made

    def learn(self, step: int) -> Learned:
        sleep(self._pause)
        chosen = self._order.of(step)
        loss = (_network(self._made, self._x[chosen]) - self._y[chosen]).square().mean()
        loss.backward()
        return Learned(float("nan") if step == self._spoil else loss.item(), len(chosen))

    @torch.no_grad()
    def measure(self) -> float:
        return float((_network(self._made, self._held) - self._wanted).square().mean())


def _network(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ weights["a"].T + weights["b"]) @ weights["c"].T


def fit(
    folder: Path, steps: int, *, rate: float = 0.02, tell: Tell = lambda _: None, **task: float
) -> tuple[Fitting, Outcome]:
    fitting = Fitting(**task)  # type: ignore[arg-type]
    outcome = train(
        fitting,
        AdamW(parameters=fitting.parameters, decay=0.01, rates={"b": 2.0}),
        Regimen(
            schedule=Schedule(steps=steps, rate=rate, warmup=5), measure_every=10, save_every_s=0
        ),
        folder,
        job={"steps": steps, "rate": rate},
        tell=tell,
    )
    return fitting, outcome


if __name__ == "__main__":
    where, count, result = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    made, ended = fit(where, count, pause=float(sys.argv[4]))
    save(result, made.parameters, {"best": ended.best, "tokens": ended.tokens})
