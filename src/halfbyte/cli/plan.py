"""`halfbyte plan`: where every byte goes, what fits, and the command to type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.columns import columns
from halfbyte.cli.console import document
from halfbyte.cli.values import gib, length, sequences, size

if TYPE_CHECKING:
    from halfbyte.specs import DeviceKind, Machine, Place, Plan


@click.command("plan")
@flags.MODEL
@click.option("--budget", type=size, help="All the memory it may take: 12GiB, 8GB.")
@click.option("--machine", help="A card that is not here: rtx-3060, 4070-ti-super.")
@click.option("--context", type=length, help="Positions of one sequence, e.g. 32k.")
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), help="How keys are kept.")
@click.option("--recipe", help="How weights are stored: q4_0, q8_0, a .toml file.")
@click.option(
    "--sequences",
    type=sequences,
    default="1",
    show_default=True,
    help="At once; max finds how many fit.",
)
@flags.DRAFT
@flags.LORA
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda.")
@flags.CARD_LAYERS
@flags.TRAINING
@click.option(
    "--emit",
    type=click.Path(path_type=Path),
    help="Write the plan, for run and fill; with --train deepspeed.json or accelerate.yaml.",
)
@flags.CALIBRATION
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
    sequences: int | None,
    draft: Any,
    drafter: str,
    loras: tuple[str, ...],
    device: str,
    card_layers: int | None,
    train: Any,
    batch: int,
    seq: int,
    precision: Any,
    optimizer: Any,
    checkpointing: bool,
    loss_rows: int | None,
    rank: int,
    targets: tuple[str, ...],
    tokens: int | None,
    gpus: int,
    zero: int,
    offload: Any,
    emit: Path | None,
    calibration: bool,
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
    from halfbyte.specs import most_drafts

    refuse_strangers(ctx, training=train is not None)
    where = this_machine(_kind(device)) if machine is None else _in_this_machine(card(machine))
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
            targets=targets,
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
        draft=most_drafts(draft),
        card_layers=card_layers,
    )
    known = model_of(
        model, drafter=None if draft == "off" else drafter, adapters=flags.references(loras)
    )
    plan, alternatives = solve(known, where, goal, flags.measured(calibration))
    if emit is not None:
        emit.write_text(json.dumps(plan.document(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        others = [_brief(other) for other in alternatives]
        document("plan", {**plan.document(), "alternatives": others})
    else:
        _say(plan, alternatives, where)


def _kind(device: str) -> DeviceKind:
    """That of the device which `run` would take."""
    from halfbyte.kernels.choice import usable

    return "cuda" if usable(device).startswith("cuda") else "cpu"


def _in_this_machine(found: Machine) -> Machine:
    """A card that is not here, as if it were: what it has no room for lies in this memory."""
    from halfbyte.planner.probe import this_machine

    return replace(found, host=this_machine())


def refuse_strangers(ctx: click.Context, *, training: bool) -> None:
    """Flags of running a model beside --train, and those of training without it."""
    for name in ctx.params:
        if not flags.was_given(ctx, name):
            continue
        flag = NAMED.get(name, "--" + name.replace("_", "-"))
        if name in flags.OF_TRAINING and not training:
            raise click.UsageError(f"{flag} is a part of a training: add --train")
        if name in OF_RUNNING and training:
            raise click.UsageError(f"{flag} says how a model is run, and not how it is trained")


NAMED = {"loras": "--lora", "targets": "--target"}
OF_RUNNING = ("context", "kv", "sequences", "draft", "drafter", "loras", "card_layers")


def _brief(plan: Plan) -> dict[str, Any]:
    return {
        **asdict(plan.setup),
        "fits": plan.fits,
        "total_bytes": plan.total_bytes,
        "tokens_per_s": plan.tokens_per_s,
        "command": next_command(plan),
    }


def _say(plan: Plan, alternatives: list[Plan], machine: Machine) -> None:
    click.echo(f"{plan.model} on {machine.name}, {plan.ops}: {_how(plan)}")
    for line in columns([*_ledger(plan, "device")], right=(2,)):
        click.echo(line)
    if plan.setup.card_layers is not None and machine.host is not None:
        click.echo(f"and on its host, {machine.host.name}:")
        for line in columns([*_ledger(plan, "host")], right=(2,)):
            click.echo(line)
    for row in plan.left_out:
        click.echo(f"  left out: {row.component}, {gib(row.bytes)} {row.note}")
    if len(alternatives) > 1:
        click.echo("alternatives, each with the longest context that fits")
        for line in columns([ALTERNATIVES, *map(_alternative, alternatives)], right=(3, 4, 5, 6)):
            click.echo(line)
    click.echo(f"next: {next_command(plan)}")


ALTERNATIVES = ("weights", "cache", "drafts", "takes", "context", "tokens/s", "full", "")


def _how(plan: Plan) -> str:
    setup = plan.setup
    several = f"{setup.sequences} x " if setup.sequences > 1 else ""
    layers = "" if setup.card_layers is None else f"{setup.card_layers} layers on the card, "
    drafter = "no drafter" if setup.drafter is None else f"drafts by {Path(setup.drafter).name}"
    empty, full = (f"{rate:.3g}" for rate in plan.tokens_per_s or (0, 0))
    speed = f", about {empty} tokens/s, {full} when it is full" if plan.tokens_per_s else ""
    return f"{layers}{several}{setup.context} positions, {setup.kv} cache, {drafter}{speed}"


def _ledger(plan: Plan, place: Place) -> Iterator[tuple[str, str, str, str]]:
    """Component, a mark if it is calibrated, bytes, note: of all that lies there."""
    for row in plan.rows:
        if row.bytes and row.place == place:
            sign = "-" if row.bytes < 0 else ""
            mark = "~" if row.basis == "calibrated" else ""
            yield row.component, mark, sign + gib(abs(row.bytes)), row.note
    total, budget = plan.total_bytes, plan.budget_bytes
    if place == "host":
        total, budget = plan.host_bytes, plan.host_budget_bytes
    verdict = f"{'fits' if total <= budget else 'does NOT fit'} into {gib(budget)}"
    yield "total", "", gib(total), verdict


def _alternative(plan: Plan) -> tuple[str, ...]:
    setup = plan.setup
    rates = [f"{rate:.3g}" for rate in plan.tokens_per_s or ()] or ["", ""]
    drafts = "off" if not setup.draft else "drafter" if setup.drafter else "lookup"
    context = str(setup.context) if plan.fits else ""
    verdict = "fits" if plan.fits else "does not fit"
    weights = setup.recipe or "as stored"
    if setup.card_layers is not None:
        weights += f", {setup.card_layers} layers on the card"
    return weights, setup.kv, drafts, gib(plan.total_bytes), context, *rates, verdict


def next_command(plan: Plan) -> str:
    """What to type to run a plan; with several sequences, to prove it."""
    setup = plan.setup
    words = ["halfbyte", "run" if setup.sequences == 1 else "fill", plan.model]
    if setup.recipe is not None:
        words += ["--recipe", setup.recipe]
    words += ["--context", str(setup.context), "--kv", setup.kv]
    if setup.sequences > 1:
        words += ["--sequences", str(setup.sequences)]
    if not setup.draft:
        words += ["--draft", "off"]
    elif setup.drafter is not None:
        words += ["--drafter", setup.drafter]
    if setup.card_layers is not None:
        words += ["--card-layers", str(setup.card_layers)]
    for adapter in setup.adapters:
        words += ["--lora", adapter]
    return shlex.join(words)
