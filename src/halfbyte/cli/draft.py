"""`halfbyte draft`: a drafter for a target: trained, measured, and cut to what the target says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import course, document, note, progress
from halfbyte.cli.values import gib, length, named_files, shares

if TYPE_CHECKING:
    from halfbyte.workflows.drafting import Need, Trained
    from halfbyte.workflows.rating import Rating

EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
DATA = click.option(
    "--data",
    multiple=True,
    required=True,
    type=EXISTING,
    metavar="FILE",
    help="A text, or .jsonl conversations, that TARGET is made to answer; several share equally.",
)
DEVICE = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:INDEX."
)
THREADS = click.option("--threads", type=click.IntRange(min=1), help="Compute threads.")


@click.group("draft")
def command() -> None:
    """A drafter for TARGET: several tokens from one forward, the same text."""


@command.command("train")
@click.argument("target")
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
def train(
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


@command.command("shortlist")
@click.argument("target")
@click.option(
    "-o",
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the tokens go, for draft train --shortlist.",
)
@DATA
@click.option(
    "--tokens", type=length, default="200k", show_default=True, help="Of TARGET's to count."
)
@click.option("--size", type=length, help="Tokens of the head.")
@click.option(
    "--coverage",
    type=click.FloatRange(0.5, 1.0),
    default=0.999,
    show_default=True,
    help="Instead of a size: the part of what TARGET says that the head must hold.",
)
@DEVICE
@THREADS
@flags.JSON
def shortlist(
    target: str,
    out: Path | None,
    data: tuple[Path, ...],
    tokens: int,
    size: int | None,
    coverage: float,
    device: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Which tokens TARGET really says, and how many of them a drafter's head needs.

    A shortlist makes a step of the drafter cheaper; what is not on it is never drafted. Drafters
    with one are for halfbyte alone: other programs want the whole head.
    """
    from halfbyte.workflows import shortlisting
    from halfbyte.workflows.listening import Lessons, Listening

    listening = Listening(
        target, Lessons(files=data, tokens=tokens), device=device, threads=threads
    )
    with progress("listening to the target") as report:
        passages = listening.passages(report)
    found = shortlisting.shortlist(
        passages,
        listening.source.spec.vocab,
        always=listening.library.stop_ids,
        size=size,
        coverage=coverage,
    )
    if out is not None:
        shortlisting.write(found, out)
    if as_json:
        document("draft-shortlist", shortlisting.fields(found))
        return
    click.echo(
        f"{found.counted:,} tokens counted, {found.different:,} of {found.vocab:,} different"
    )
    for count, share in found.coverages:
        click.echo(f"  {count:8,} tokens cover {share:.4%}")
    click.echo(f"taken: {len(found.tokens):,} tokens, {found.coverage:.4%} of what was said")


@command.command("eval")
@click.argument("target")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[NAME=]FILE",
    help="A text that TARGET continues, or .jsonl conversations that it answers; may be repeated. "
    "Without any, short ones of our own.",
)
@click.option(
    "--drafts",
    "lengths",
    multiple=True,
    type=click.IntRange(1, 7),
    help="Of a round; may be repeated. [default: 4]",
)
@click.option("--prompts", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--rates", type=shares, metavar="R,R,...", help="What would these rates bring here?")
@click.option("--ahead", type=click.IntRange(0, 1), help="Query positions after the last key.")
@flags.DRAFTER
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def evaluate(
    target: str,
    texts: tuple[str, ...],
    lengths: tuple[int, ...],
    prompts: int,
    max_tokens: int,
    rates: Sequence[float] | None,
    ahead: int | None,
    drafter: str,
    kv: Any,
    device: str,
    dtype: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """How many drafts of TARGET's drafter are right, by kind of text, and the gain to expect here.

    Without a drafter: what is gained by repeating what was said, and what one of the usual shape
    would have to get right (--rates).
    """
    from halfbyte.specs import LoadOptions
    from halfbyte.workflows import rating

    asked = rating.Asked(
        texts=named_files(texts),
        lengths=lengths or (4,),
        prompts=prompts,
        tokens=max_tokens,
        ahead=ahead,
    )
    options = LoadOptions(device=device, dtype=dtype, threads=threads, kv=kv, drafter=drafter)
    with progress("drafting") as report:
        found = rating.rate(
            target, asked=asked, rates=rates or (), options=options, progress=report
        )
    if as_json:
        document("draft-eval", _rating_fields(found))
    else:
        _show_rating(found)


def _rating_fields(found: Rating) -> dict[str, Any]:
    rows = [
        {
            "text": row.text,
            "sampling": row.manner,
            **asdict(row.acceptance),
            "tokens_per_round": row.acceptance.tokens_per_round,
            "expected_speedup": row.gain,
        }
        for row in found.rows
    ]
    return {
        "ops": found.ops,
        "drafter": found.drafter,
        "rows_s": found.costs.rows,
        "draft_step_s": found.costs.draft,
        "rows": rows,
        "assumed_speedup": found.assumed,
    }


def _show_rating(found: Rating) -> None:
    one = found.costs.rows[0]
    rows = " ".join(f"{seconds / one:.2f}" for seconds in found.costs.rows)
    click.echo(f"{found.ops}: a forward of one row {1000 * one:.3f} ms; of 1, 2, ... rows {rows}")
    click.echo(f"  a step of the drafter ({found.drafter}) {found.costs.draft / one:.2f}")
    for row in found.rows:
        it = row.acceptance
        right = " ".join(f"{rate:.3f}" for rate in it.by_position)
        click.echo(
            f"  {row.text:16} {row.manner:8} {it.drafter:7} K={it.length}  {right}  "
            f"{it.tokens_per_round:.2f} a round in {it.share:.0%}, expected {row.gain:.2f}x"
        )
    for count, gain in enumerate(found.assumed, 1):
        click.echo(f"  at the rates assumed, K={count}: {gain:.2f}x")


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
