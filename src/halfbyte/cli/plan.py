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
from halfbyte.errors import DoesNotFitError

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
@click.option("--emit", type=click.Path(path_type=Path), help="Write the plan for run and fill.")
@flags.JSON
def command(
    model: str,
    budget: int | None,
    machine: str | None,
    context: int | None,
    kv: Any,
    recipe: str | None,
    sequences: int,
    draft: int,
    device: str,
    emit: Path | None,
    as_json: bool,
) -> None:
    """Say what MODEL takes on this machine, on a card, or in a budget, before it is run.

    Exits with 3 when nothing fits, naming the nearest thing that would.
    """
    from halfbyte.planner.cards import card
    from halfbyte.planner.opening import model_of
    from halfbyte.planner.probe import this_machine
    from halfbyte.planner.solve import Goal, solve

    where = this_machine("cuda" if device.startswith("cuda") else "cpu")
    if machine is not None:
        where = card(machine)
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
    if not plan.fits:
        raise DoesNotFitError(
            f"{gib(plan.total_bytes)} do not fit into {gib(plan.budget_bytes)}",
            hint="a smaller --context, --kv q8_0, or a smaller --recipe",
        )


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
