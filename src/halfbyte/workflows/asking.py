"""What may be asked of a distillation, with what is usual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from halfbyte.training.modes import Mode, Rates
from halfbyte.training.samples import Mix


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilling:
    """What is learned from, how, and what it is measured on.

    `data` are texts and conversations, `own_tokens` so many more of the model's own; `task` are
    conversations to be learned for themselves, `task_share` of their loss. `held_out` (by default
    our own short texts) is measured at the end, `max_windows` of each, and nothing of it may be
    learned. `merged` are adapters, `PATH[@SCALE]`, with which the model is the original. `start`: a
    quantized form of it, by default made here. `batch` windows go into a step, `at_once` through
    the model at a time; where it stands is saved every `save_every_s` seconds. `alpha` (by default
    the rank) and `targets` (by default all linears) are those of an adapter. `budget` bytes decide
    the mode where it is "auto". By `curvature` windows modes that move integers learn what errors
    of a weight cost (`training/fisher.py`); by none they do without. `made_by` is the command line
    that a report tells of.
    """

    data: Sequence[Path]
    merged: Sequence[str] = ()
    held_out: Sequence[Path] = ()
    max_windows: int | None = 128
    task: Sequence[Path] = ()
    task_share: float = 0.5
    own_tokens: int = 0
    mix: Mix
    held: int = 16
    mode: Mode | Literal["auto"] = "auto"
    steps: int = 1000
    batch: int = 8
    at_once: int = 8
    warmup: float = 0.05
    rates: Rates = field(default_factory=Rates)
    rank: int = 16
    alpha: float | None = None
    targets: Sequence[str] = ()
    curvature: int = 1024
    small: bool = False
    again: bool = True
    recipe: str = "q4_0"
    start: Path | None = None
    measure_every: int = 50
    save_every_s: float = 60.0
    seed: int = 0
    budget: int | None = None
    device: str = "auto"
    threads: int | None = None
    force: bool = False
    made_by: str = "halfbyte distill"
