"""What `halfbyte plan --train` says: a ledger for a GPU, the host and the disk, and the other ways
to train the same batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli.columns import columns
from halfbyte.cli.console import document
from halfbyte.cli.values import gib
from halfbyte.errors import DoesNotFitError

if TYPE_CHECKING:
    from halfbyte.planner.solve import Model
    from halfbyte.planner.training import Training
    from halfbyte.planner.ways import TrainingPlan
    from halfbyte.specs import Machine

PLACES = {"device": "on each device", "host": "in the host", "disk": "on disk"}


def tell(
    model: Model,
    machine: Machine,
    training: Training,
    budget: int | None,
    emit: Path | None,
    *,
    as_json: bool,
) -> None:
    """Plans, writes an engine's file where that is asked for, and speaks. `DoesNotFitError`."""
    from halfbyte.planner.ways import other_ways, plan_training

    plan = plan_training(model, machine, training, budget_bytes=budget)
    others = [
        plan_training(model, machine, other, budget_bytes=budget)
        for other in other_ways(model, training)
    ]
    if emit is not None:
        from halfbyte.planner.engines import written
        from halfbyte.planner.training import block_weights

        text = written(emit.name, training, live=2 * block_weights(model.spec))
        emit.write_text(text, encoding="utf-8")
    if as_json:
        document("plan", _fields(plan, others, model))
    else:
        _say(plan, others, model)
    if not plan.fits:
        raise _does_not_fit(plan, others)


def _fields(plan: TrainingPlan, others: list[TrainingPlan], model: Model) -> dict[str, Any]:
    from halfbyte.planner.ways import rules_of_thumb

    return {
        **plan.document(),
        "alternatives": [
            {**asdict(other.training), "fits": other.fits, "total_bytes": other.total()}
            for other in others
        ],
        "rules_of_thumb": [asdict(rule) for rule in rules_of_thumb(model.spec.parameters)],
    }


def _say(plan: TrainingPlan, others: list[TrainingPlan], model: Model) -> None:
    from halfbyte.planner.ways import rules_of_thumb

    training = plan.training
    several = f"{training.gpus} x " if training.gpus > 1 else ""
    click.echo(f"{plan.model} on {several}{plan.machine}: {_named(training)}")
    for place, title in PLACES.items():
        rows = [cost for cost in plan.costs if cost.place == place and cost.bytes]
        if not rows:
            continue
        click.echo(title)
        lines = [
            (cost.component, "~" if cost.basis == "calibrated" else "", gib(cost.bytes), cost.note)
            for cost in rows
        ]
        total = sum(cost.bytes for cost in rows)
        lines.append(("total", "", gib(total), _verdict(plan) if place == "device" else ""))
        for line in columns(lines, right=(2,)):
            click.echo(line)
    click.echo("the same batch, trained otherwise")
    ways = [
        (_named(other.training), gib(other.total()), "fits" if other.fits else "does not fit")
        for other in others
    ]
    for line in columns(ways, right=(1,)):
        click.echo(line)
    click.echo("rules of thumb, and what they leave out")
    rules = rules_of_thumb(model.spec.parameters)
    told = [(rule.name, f"{rule.bytes / 1e9:.1f} GB", rule.leaves_out) for rule in rules]
    for line in columns(told, right=(1,)):
        click.echo(line)


def _named(training: Training) -> str:
    zero = f", ZeRO {training.zero}" if training.zero else ""
    offload = f", offloaded to {training.offload}" if training.offload != "none" else ""
    kept = "" if training.checkpointing else ", no checkpointing"
    return (
        f"{training.mode}, {training.precision} {training.optimizer},"
        f" {training.batch} x {training.length} tokens{zero}{offload}{kept}"
    )


def _verdict(plan: TrainingPlan) -> str:
    return f"{'fits' if plan.fits else 'does NOT fit'} into {gib(plan.budget_bytes)}"


def _does_not_fit(plan: TrainingPlan, others: list[TrainingPlan]) -> DoesNotFitError:
    """Names the ways that would fit, or what the least of them takes."""
    fitting = [other for other in others if other.fits]
    least = min((plan, *others), key=lambda other: other.total())
    hint = f"--train {least.training.mode} takes the least, {gib(least.total())}"
    if fitting:
        hint = f"{', '.join(f'--train {other.training.mode}' for other in fitting)} would fit"
    return DoesNotFitError(
        f"{gib(plan.total())} do not fit into {gib(plan.budget_bytes)}",
        hint=f"{hint}; less: --batch, --seq, --loss-rows, --optimizer adamw-8bit",
    )
