"""`halfbyte fill`: the plan, proved by filling it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document
from halfbyte.cli.values import gib
from halfbyte.errors import DoesNotFitError

if TYPE_CHECKING:
    from halfbyte.evals.fill import Filled
    from halfbyte.specs import Plan


@click.command("fill")
@flags.MODEL
@flags.CACHE
@click.option("--sequences", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--plan", "plan_file", type=click.Path(exists=True, path_type=Path))
@flags.JSON
def command(
    model: str, context: int | None, kv: Any, sequences: int, plan_file: Path | None, as_json: bool
) -> None:
    """Fill MODEL's cache to the planned context, and measure every part beside the plan.

    Exits with 3 when it does not fit, or differs from the plan by more than 3 % and 32 MiB.
    """
    from halfbyte.evals.fill import fill
    from halfbyte.kernels.choice import choose
    from halfbyte.quantizer.opening import open_source

    plan = _plan(model, context, kv, sequences, plan_file)
    if not plan.fits:
        raise DoesNotFitError(f"{gib(plan.total_bytes)} into {gib(plan.budget_bytes)}")
    source = open_source(model, recipe=plan.setup.recipe)
    filled = fill(source, choose(source.spec), plan)
    if as_json:
        document("fill", _fields(plan, filled))
    else:
        _say(plan, filled)
    if not filled.holds:
        raise DoesNotFitError(
            f"the plan is wrong by {gib(abs(filled.total.error_bytes))}",
            hint="please report this with --json; other processes may have disturbed it",
        )


def _plan(model: str, context: int | None, kv: Any, sequences: int, file: Path | None) -> Plan:
    from halfbyte.planner.opening import model_of
    from halfbyte.planner.probe import this_machine
    from halfbyte.planner.solve import Goal, solve
    from halfbyte.specs import plan_of

    if file is not None:
        return plan_of(json.loads(file.read_text(encoding="utf-8")))
    goal = Goal(context=context, kv=kv, sequences=sequences)
    plan, _ = solve(model_of(model), replace(this_machine()), goal)
    return plan


def _fields(plan: Plan, filled: Filled) -> dict[str, Any]:
    rows = [*filled.parts, filled.total]
    return {
        "model": plan.model,
        "ops": plan.ops,
        "setup": asdict(plan.setup),
        "rows": [{**asdict(row), "error_bytes": row.error_bytes} for row in rows],
        "holds": filled.holds,
    }


def _say(plan: Plan, filled: Filled) -> None:
    click.echo(f"{plan.model}, {plan.ops}, context {plan.setup.context}, {plan.setup.kv} cache")
    click.echo(f"  {'':10} {'planned':>12} {'measured':>12} {'error':>12}")
    for row in (*filled.parts, filled.total):
        sign = "-" if row.error_bytes < 0 else "+"
        error = sign + gib(abs(row.error_bytes))
        click.echo(
            f"  {row.part:10} {gib(row.planned_bytes):>12} {gib(max(0, row.measured_bytes)):>12}"
            f" {error:>12}"
        )
