"""`halfbyte plan`: where every byte goes, what fits, and the command to type next."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document
from halfbyte.cli.values import gib, length, size

if TYPE_CHECKING:
    from halfbyte.specs import Machine, Plan


@click.command("plan")
@flags.MODEL
@click.option("--budget", type=size, help="All the memory it may take: 12GiB, 8GB.")
@click.option("--machine", help="A card that is not here: rtx-3060, 4070-ti-super.")
@click.option("--context", type=length, help="Positions of one sequence, e.g. 32k.")
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), help="How keys are kept.")
@click.option("--recipe", help="How weights are stored: q4_0, q8_0, a .toml file.")
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--draft", type=click.IntRange(0, 7), default=0, help="Tokens drafted at once.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@flags.TRAINING
@click.option(
    "--emit",
    type=click.Path(path_type=Path),
    help="Write the plan, for run and fill; with --train deepspeed.json or accelerate.yaml.",
)
@flags.JSON
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    budget: int | None,
    machine: str | None,
    context: int | None,
    kv: Any,
    recipe: str | None,
    sequences: int,
    draft: int,
    device: str,
    train: Any,
    batch: int,
    seq: int,
    precision: Any,
    optimizer: Any,
    checkpointing: bool,
    loss_rows: int | None,
    rank: int,
    tokens: int | None,
    gpus: int,
    zero: int,
    offload: Any,
    emit: Path | None,
    as_json: bool,
) -> None:
    """Say what MODEL takes on this machine, on a card, or in a budget, before it is run.

    With --train, what training it takes. Exits with 3 when nothing fits, naming the nearest thing
    that would.
    """
    from halfbyte.planner.cards import card
    from halfbyte.planner.opening import model_of
    from halfbyte.planner.probe import this_machine
    from halfbyte.planner.solve import Goal, solve

    refuse_strangers(ctx, training=train is not None)
    where = card(machine) if machine is not None else this_machine(_kind(device))
    if train is not None:
        from halfbyte.cli.plan_training import tell
        from halfbyte.planner.training import Training

        training = Training(
            mode=train,
            batch=batch,
            length=seq,
            precision=precision,
            optimizer=optimizer,
            checkpointing=checkpointing,
            loss_rows=loss_rows,
            rank=rank,
            recipe=recipe or "q4_0",
            tokens=tokens or 0,
            gpus=gpus,
            zero=zero,
            offload=offload,
        )
        tell(model_of(model), where, training, budget, emit, as_json=as_json)
        return
    goal = Goal(
        budget_bytes=budget,
        context=context,
        recipe=recipe,
        kv=kv,
        sequences=sequences,
        draft=draft,
    )
    plan, alternatives = solve(model_of(model), where, goal)
    if emit is not None:
        emit.write_text(json.dumps(plan.document(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        others = [_brief(other) for other in alternatives]
        document("plan", {**plan.document(), "alternatives": others})
    else:
        _say(plan, alternatives, where)


def _kind(device: str) -> Any:
    return "cuda" if device.startswith("cuda") else "cpu"


def refuse_strangers(ctx: click.Context, *, training: bool) -> None:
    """Flags of running a model beside --train, and those of training without it."""
    given = [
        name
        for name in ctx.params
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name in flags.OF_TRAINING and not training:
            raise click.UsageError(f"{flag} is a part of a training: add --train")
        if name in OF_RUNNING and training:
            raise click.UsageError(f"{flag} says how a model is run, and not how it is trained")


OF_RUNNING = ("context", "kv", "sequences", "draft")


def _brief(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.setup),
        "fits": plan.fits,
        "total_bytes": plan.total_bytes,
        "tokens_per_s": plan.tokens_per_s,
        "command": next_command(plan),
    }


def _say(plan: Plan, alternatives: list[Plan], machine: Machine) -> None:
    setup = plan.setup
    click.echo(f"{plan.model} on {machine.name}, {plan.ops}")
    for row in plan.rows:
        if row.bytes:
            sign = " " if row.basis == "arithmetic" else "~"
            click.echo(f"  {row.component:28} {sign}{gib(row.bytes):>11}  {row.note}")
    verdict = "fits" if plan.fits else "does NOT fit"
    click.echo(
        f"  {'total':28}  {gib(plan.total_bytes):>11}  {verdict} into {gib(plan.budget_bytes)}"
    )
    click.echo(f"  context {setup.context}, {setup.kv} cache{_speed(plan)}")
    if len(alternatives) > 1:
        click.echo("alternatives, each with the longest context that fits")
        for other in alternatives:
            click.echo(f"  {_line(other)}")
    click.echo(f"next: {next_command(plan)}")


def _line(plan: Plan) -> str:
    setup = plan.setup
    held = f"context {setup.context}" if plan.fits else "does not fit"
    return (
        f"{setup.recipe or 'as stored':10} {setup.kv:5} {gib(plan.total_bytes):>11}"
        f"  {held}{_speed(plan)}"
    )


def _speed(plan: Plan) -> str:
    if plan.tokens_per_s is None:
        return ""
    empty, full = plan.tokens_per_s
    return f", about {empty:.3g} tokens/s, {full:.3g} when it is full"


def next_command(plan: Plan) -> str:
    """What to type to run a plan."""
    setup = plan.setup
    recipe = "" if setup.recipe is None else f" --recipe {setup.recipe}"
    return f"halfbyte run {plan.model}{recipe} --context {setup.context} --kv {setup.kv}"
