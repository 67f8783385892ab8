"""`halfbyte doctor`: what is wrong with this machine or a model, what to do, what to expect.

The machine is examined with the standard library alone, so that it works where halfbyte does not;
the rooms that read models are opened when there is one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.cli.values import draft as drafts
from halfbyte.cli.values import gib, length
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.planner.doctor.finding import Finding, Severity, examine, worst

if TYPE_CHECKING:
    from halfbyte.planner.doctor.facts import MachineFacts
    from halfbyte.planner.doctor.reading import Model
    from halfbyte.specs import Plan

BLOCKED = 3
COLOURS: dict[Severity, str] = {
    "ok": "green",
    "note": "cyan",
    "warning": "yellow",
    "fault": "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What to expect of a model here, or why nothing."""

    plan: Plan | None = None
    refusal: HalfbyteError | None = None

    def fields(self) -> dict[str, Any]:
        refusal = None if self.refusal is None else str(self.refusal)
        return {"plan": None if self.plan is None else self.plan.document(), "refusal": refusal}


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--context", type=length, help="The context that is wanted of MODEL, e.g. 32k.")
@click.option("--draft", type=drafts, default="off", help="Tokens drafted at once, if any.")
@click.option("--quick", is_flag=True, help="Hash nothing, measure nothing.")
@click.option(
    "--bundle",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.zip",
    help="Write a report for whoever helps, without names, tokens and folders.",
)
@flags.JSON
def command(
    model: str | None,
    context: int | None,
    draft: int | str,
    quick: bool,
    bundle: Path | None,
    as_json: bool,
) -> None:
    """Examine this machine, and MODEL if one is given; say what is wrong and what to do.

    Ends with what to expect: recipe, context, tokens a second. Exits with 3 on a fault.
    """
    from halfbyte.planner.doctor.machine import CHECKS, machine_facts

    facts = machine_facts(measure=not quick)
    findings = {"machine": examine(facts, CHECKS)}
    examined, expected = None, None
    if model is not None:
        depth = draft if isinstance(draft, int) else 0
        examined, findings["model"] = _examine_model(model, context, depth, hashing=not quick)
        expected = _expect(examined, facts, findings, context, depth)
    report = {
        "worst": worst(it for group in findings.values() for it in group),
        "model": model,
        "findings": [
            {"subject": subject, **asdict(it)}
            for subject, group in findings.items()
            for it in group
        ],
        "expected": None if expected is None else expected.fields(),
    }
    if bundle is not None:
        _write(bundle, report, facts, examined)
    if as_json:
        from halfbyte.planner.doctor.bundle import plain

        document("doctor", {**report, "machine": plain(facts)})
    else:
        _say(findings, model, expected)
    if report["worst"] == "fault" or (expected is not None and expected.refusal is not None):
        click.get_current_context().exit(BLOCKED)


def _examine_model(
    model: str, context: int | None, draft: int, *, hashing: bool
) -> tuple[Model, list[Finding]]:
    from halfbyte.planner.doctor.model import CHECKS
    from halfbyte.planner.doctor.reading import model_facts

    with progress("hashing", in_bytes=True) if hashing else nullcontext() as report:
        read = model_facts(_place(model), model, progress=report, hashing=hashing)
    examined = replace(read, facts=replace(read.facts, context=context, draft=draft))
    return examined, examine(examined.facts, CHECKS)


def _place(model: str) -> Path:
    """Where a model lies; nothing is fetched."""
    from halfbyte.formats.hub import cached
    from halfbyte.formats.reference import DEMO, demo_path

    path = demo_path() if model == DEMO else Path(model).expanduser()
    found = path if path.exists() else cached(model)
    if found is None:
        raise InvalidInputError(
            f"'{model}' is not on this machine", hint=f"halfbyte pull {model} fetches it"
        )
    return found


def _expect(
    examined: Model,
    facts: MachineFacts,
    findings: dict[str, list[Finding]],
    context: int | None,
    draft: int,
) -> Prospect | None:
    """The best plan; None for what cannot be read, or drafts for another model."""
    from halfbyte.planner.doctor.prospect import prospect
    from halfbyte.planner.solve import Goal

    source = examined.source
    if source is None or source.spec.drafter is not None:
        return None
    goal = Goal(context=context, draft=draft)
    try:
        name = examined.facts.name
        return Prospect(plan=prospect(name, source, facts, findings["machine"], goal))
    except HalfbyteError as error:
        return Prospect(refusal=error)


def _write(path: Path, report: dict[str, Any], facts: MachineFacts, examined: Model | None) -> None:
    from halfbyte.planner.doctor.bundle import redaction_of, write_bundle

    files: dict[str, Any] = {"doctor.json": report, "machine.json": facts}
    if examined is None:
        redaction = redaction_of()
    else:
        files["model.json"] = examined.facts
        redaction = redaction_of(examined.facts.name, _place(examined.facts.name))
    write_bundle(path, files, redaction)
    note(f"wrote {path}: look through it before you give it away")


def _say(findings: dict[str, list[Finding]], model: str | None, expected: Prospect | None) -> None:
    for subject, group in findings.items():
        click.echo(subject if model is None or subject == "machine" else f"model {model}")
        _table(group)
    if expected is not None:
        _say_expected(expected)
    counts = Counter(it.severity for group in findings.values() for it in group)
    click.echo(", ".join(f"{count} {severity}" for severity, count in counts.items()))


def _table(findings: Sequence[Finding]) -> None:
    if not (sys.stdout.isatty() and _draw(findings)):
        for it in findings:
            click.echo(f"  {it.severity:8} {it.name:18} {it.finding}")
            if it.fix:
                click.echo(f"  {'':8} {'':18} fix: {it.fix}")


def _draw(findings: Sequence[Finding]) -> bool:
    """A table for a terminal; False where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(box=None, padding=(0, 1), show_header=False)
    for it in findings:
        told = Text(it.finding)
        if it.fix:
            told.append(f"\nfix: {it.fix}", style="dim")
        table.add_row(Text(it.severity, style=COLOURS[it.severity]), it.name, told)
    Console().print(table)
    return True


def _say_expected(expected: Prospect) -> None:
    from halfbyte.cli.plan import next_command

    plan = expected.plan
    if plan is None:
        click.echo(f"expected: {expected.refusal}")
        return
    setup = plan.setup
    free = plan.budget_bytes - plan.part("runtime.other_processes")
    click.echo(
        f"expected: {plan.model}, {setup.recipe or 'as it is stored'}, context {setup.context} "
        f"({setup.kv} cache), {gib(plan.own_bytes)} where {gib(free)} are free, {plan.ops}"
        f"{_speed(plan)}"
    )
    click.echo(f"next: {next_command(plan)}")


def _speed(plan: Plan) -> str:
    if plan.tokens_per_s is None:
        return "; its speed was not measured"
    empty, full = plan.tokens_per_s
    return f", about {empty:.3g} tokens/s, {full:.3g} when the context is full"
