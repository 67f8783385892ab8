"""`halfbyte draft shortlist`: which tokens a target really says."""

from __future__ import annotations

from pathlib import Path

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress
from halfbyte.cli.drafter.data import DATA, DEVICE, TARGET, THREADS
from halfbyte.cli.values import length


@click.command("shortlist")
@TARGET
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
def command(
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
