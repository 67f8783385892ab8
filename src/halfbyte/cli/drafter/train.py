"""`halfbyte draft train`: a drafter from what its target says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import course, document, note, progress
from halfbyte.cli.drafter.data import DATA, DEVICE, EXISTING, TARGET, THREADS
from halfbyte.cli.values import gib, length

if TYPE_CHECKING:
    from halfbyte.workflows.drafting import Need, Trained


@click.command("train")
@TARGET
@click.option(
    "-o", "out", required=True, type=click.Path(path_type=Path), help="The drafter, X.gguf."
)
@DATA
@click.option(
    "--tokens", type=length, default="400k", show_default=True, help="Of TARGET's to learn from."
)
@click.option("--window", type=click.IntRange(min=64), default=512, show_default=True)
@click.option(
    "--longest",
    type=click.IntRange(min=8),
    default=192,
    show_default=True,
    help="Tokens of one of TARGET's answers.",
)
@click.option(
    "--start",
    default="auto",
    show_default=True,
    metavar="PATH|auto|none",
    help="A drafter to go on from; auto takes the one beside TARGET.",
)
@click.option("--layers", type=click.IntRange(min=1), help="Of a new drafter. [default: 2 or 4]")
@click.option("--hidden", type=click.IntRange(min=32), help="Width of a new drafter.")
@click.option("--width", type=click.IntRange(min=32), help="Of its MLP. [default: 4 x hidden]")
@click.option("--shortlist", type=EXISTING, metavar="FILE", help="Of halfbyte draft shortlist.")
@click.option("--own-head", is_flag=True, help="Learn the head, too, where it is TARGET's.")
@click.option(
    "--passes",
    type=click.FloatRange(min=0.0),
    default=2.0,
    show_default=True,
    help="Over what is learned from.",
)
@click.option(
    "--rate", type=click.FloatRange(min=0.0, min_open=True), default=2e-3, show_default=True
)
@click.option(
    "--drafts",
    type=click.IntRange(1, 7),
    default=4,
    show_default=True,
    help="Of a round that is taught.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=16),
    default=1024,
    show_default=True,
    help="Places that are learned from in a step.",
)
@click.option(
    "--recipe",
    type=click.Choice(["auto", "q4_0", "q4_0-pure", "q8_0", "f32"]),
    default="auto",
    show_default=True,
    help="auto: the smallest that keeps its acceptance.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@DEVICE
@THREADS
@flags.JSON
def command(
    target: str,
    out: Path,
    data: tuple[Path, ...],
    tokens: int,
    window: int,
    longest: int,
    start: str,
    layers: int | None,
    hidden: int | None,
    width: int | None,
    shortlist: Path | None,
    own_head: bool,
    passes: float,
    rate: float,
    drafts: int,
    rows: int,
    recipe: str,
    seed: int,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Train a drafter for TARGET as it is stored, on what TARGET itself says.

    A run that was stopped goes on where it was when it is started again.
    """
    from halfbyte.workflows import drafting
    from halfbyte.workflows.listening import Lessons, Listening
    from halfbyte.workflows.shortlisting import read_shortlist

    listening = Listening(
        target,
        Lessons(files=data, tokens=tokens, window=window, longest=longest, seed=seed),
        device=device,
        threads=threads,
    )
    making = drafting.Drafting(
        listening,
        out,
        build=drafting.Build(
            layers=layers,
            hidden=hidden,
            width=width,
            shortlist=None if shortlist is None else read_shortlist(shortlist),
            start=start,
            own_head=own_head,
        ),
        course=drafting.Course(passes=passes, rate=rate, length=drafts, rows=rows, recipe=recipe),
    )
    _show_need(making.check())
    with progress("listening to the target") as report:
        passages = listening.passages(report)
    with progress("reading") as seeing, course("training") as tell:
        made = making.run(passages, seeing=seeing, tell=tell)
    if as_json:
        document("draft-train", _made_fields(made))
    else:
        _show(made)


def _show_need(need: Need) -> None:
    for what, size in need.rows.items():
        note(f"  {what:40} {gib(size):>10}")
    note(f"  {'on the disk, meanwhile':40} {gib(need.disk):>10}")


def _made_fields(made: Trained) -> dict[str, Any]:
    return {
        "path": str(made.path),
        "manifest": str(made.manifest),
        "bytes": made.bytes,
        "recipe": made.recipe,
        "before": made.before,
        "exact": made.exact,
        "accepted": made.accepted,
        "tokens_per_round": made.tokens_per_round,
        "ended": made.outcome.ended,
        "steps": made.outcome.steps,
        "best_step": made.outcome.best_step,
        "tokens": made.outcome.tokens,
        "seconds": made.outcome.seconds,
    }


def _show(made: Trained) -> None:
    click.echo(made.path)
    rates = " ".join(f"{rate:.3f}" for rate in made.accepted)
    note(f"accepted {rates}: {made.tokens_per_round:.2f} tokens a round, greedy, held out")
    seconds = made.outcome.seconds
    note(f"{gib(made.bytes)} in {made.recipe}; {made.outcome.steps} steps, {seconds:.0f} s")
