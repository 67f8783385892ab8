"""What `halfbyte distill` says: where a training stands, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli.columns import columns
from halfbyte.cli.console import note
from halfbyte.cli.values import gib
from halfbyte.errors import UnsupportedError

if TYPE_CHECKING:
    from halfbyte.planner.ways import TrainingPlan
    from halfbyte.training.loop import Standing, Tell
    from halfbyte.workflows import Distilled

SILENCE_S = 10.0


def teller(folder: Path | None) -> Callable[[str, TrainingPlan], Tell]:
    write = _board(folder) if folder is not None else None

    def told(name: str, plan: TrainingPlan) -> Tell:
        planned = sum(cost.bytes for cost in plan.costs if cost.place == "device")
        note(f"training {name}: {gib(planned)} planned with all around it")
        last = [0.0]

        def tell(standing: Standing) -> None:
            if write is not None:
                write(name, standing)
            if monotonic() - last[0] >= SILENCE_S or standing.step == standing.steps:
                last[0] = monotonic()
                note(f"{name} {_line(standing)}")

        return tell

    return told


def _line(standing: Standing) -> str:
    from halfbyte.planner.probe import resident_bytes

    return (
        f"{standing.step}/{standing.steps}: loss {standing.loss:.5f}, held out "
        f"{standing.measure:.5f} (best {standing.best:.5f}), {standing.tokens_per_s:.0f} tokens/s, "
        f"{gib(resident_bytes())}, {_duration(standing.left_s)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def _board(folder: Path) -> Callable[[str, Standing], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError(
            "needs the package tensorboard",
            where="--tensorboard",
            hint="pip install 'halfbyte[tensorboard]'",
        ) from error
    writer = SummaryWriter(str(folder))

    def write(name: str, standing: Standing) -> None:
        for what in ("loss", "measure", "tokens_per_s"):
            writer.add_scalar(f"{name}/{what}", getattr(standing, what), standing.step)

    return write


def fields(told: Distilled) -> dict[str, Any]:
    return {
        "path": str(told.artefact.path),
        "beside": None if told.beside is None else str(told.beside),
        "manifest": str(told.artefact.manifest),
        "bytes": told.artefact.bytes,
        "source_bytes": told.artefact.source_bytes,
        "mode": told.mode,
        "outcomes": {name: asdict(outcome) for name, outcome in told.outcomes.items()},
        "marks": [asdict(mark) for mark in told.marks],
        "moved": [asdict(item) for item in told.moved],
        "before": [asdict(text) for text in told.before],
        "texts": [asdict(text) for text in told.after],
        "memory": {"planned_bytes": told.planned_bytes, "peak_bytes": told.peak_bytes},
        "notes": list(told.notes),
    }


def show(told: Distilled) -> None:
    click.echo(told.artefact.path)
    for name, outcome in told.outcomes.items():
        ended = "" if outcome.ended == "done" else " (it diverged; the best is kept)"
        note(
            f"{name}: held out {outcome.before:.5f} -> {outcome.best:.5f} at step "
            f"{outcome.best_step} of {outcome.steps}, {_duration(outcome.seconds)}{ended}"
        )
    rows = [("", "KL before", "after", "ppl before", "after")]
    for before, after in zip(told.before, told.after, strict=True):
        assert before.kl is not None and after.kl is not None
        ratios = [text.perplexity_ratio or 1.0 for text in (before, after)]
        lost = [f"{100 * (ratio - 1):+.2f} %" for ratio in ratios]
        told_of = [f"{text.mean:.5f}" for text in (before.kl, after.kl)]
        rows.append((before.name, told_of[0], told_of[1], lost[0], lost[1]))
    for line in columns(rows, right=(1, 2, 3, 4)):
        note(line)
    flipped = [item.flipped for item in told.moved if item.flipped is not None]
    if flipped:
        note(f"{100 * sum(flipped) / len(flipped):.1f} % of the integers moved, by the tensor")
    note(f"memory: {gib(told.peak_bytes)} of {gib(told.planned_bytes)} planned")
    for said in told.notes:
        note(said)
    lora = "" if told.beside is None else f" --lora {told.artefact.path}"
    note(f"next: halfbyte run {told.beside or told.artefact.path}{lora}")
