"""`halfbyte fill`: the plan, proved by filling it."""

from __future__ import annotations

from dataclasses import asdict
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
@flags.DRAFT
@flags.LORA
@flags.PLAN
@click.option("--recipe", help="Quantize an unquantized model while loading it.")
@flags.CALIBRATION
@flags.JSON
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    context: int | None,
    kv: Any,
    sequences: int,
    draft: Any,
    drafter: str,
    loras: tuple[str, ...],
    plan_file: Path | None,
    recipe: str | None,
    calibration: bool,
    as_json: bool,
) -> None:
    """Fill MODEL's cache to the planned context, and measure every part beside the plan.

    Exits with 3 when it does not fit, or differs from the plan by more than 3 % and 32 MiB.
    """
    from halfbyte.evals.fill import fill
    from halfbyte.formats.lora import open_adapter
    from halfbyte.formats.reference import locate
    from halfbyte.kernels.choice import choose
    from halfbyte.planner.calibration import remember
    from halfbyte.planner.opening import model_of
    from halfbyte.planner.probe import this_machine
    from halfbyte.planner.solve import Goal, solve
    from halfbyte.quantizer.opening import open_drafter, open_source
    from halfbyte.specs import most_drafts

    if plan_file is not None:
        plan = flags.planned(ctx, plan_file)
    else:
        goal = Goal(
            context=context,
            recipe=recipe,
            kv=kv,
            sequences=sequences,
            draft=most_drafts(draft),
        )
        known = model_of(
            model, drafter=None if draft == "off" else drafter, adapters=flags.references(loras)
        )
        plan, _ = solve(known, this_machine(), goal, flags.measured(calibration))
    if not plan.fits:
        raise DoesNotFitError(f"{gib(plan.total_bytes)} into {gib(plan.budget_bytes)}")
    setup = plan.setup
    source = open_source(model, recipe=setup.recipe)
    beside = None
    if setup.drafter is not None:
        beside = open_drafter(setup.drafter, source, locate(model), recipe=setup.recipe)
    adapters = {name: open_adapter(name, source.spec) for name in setup.adapters}
    ops = choose(source.spec)
    filled = fill(source, ops, plan, drafter=beside, adapters=adapters)
    if plan_file is None and calibration:
        remember(plan.machine, plan.ops, filled.told(plan, source.spec.vocab, ops.read_bandwidth()))
    if as_json:
        document("fill", _fields(plan, filled))
    else:
        _say(plan, filled)
    if not filled.holds:
        raise DoesNotFitError(
            f"the plan is wrong by {gib(abs(filled.total.error_bytes))}",
            hint="please report this with --json; other processes may have disturbed it",
        )


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
        if not (row.planned_bytes or row.measured_bytes):
            continue
        sign = "-" if row.error_bytes < 0 else "+"
        error = sign + gib(abs(row.error_bytes))
        click.echo(
            f"  {row.part:10} {gib(row.planned_bytes):>12} {gib(max(0, row.measured_bytes)):>12}"
            f" {error:>12}"
        )
