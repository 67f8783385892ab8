"""`halfbyte draft eval`: how many drafts are right, and what that is worth here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress
from halfbyte.cli.drafter.data import TARGET
from halfbyte.cli.values import named_files, shares

if TYPE_CHECKING:
    from halfbyte.workflows.rating import Rating


@click.command("eval")
@TARGET
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
def command(
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
        document("draft-eval", _fields(found))
    else:
        _show(found)


def _fields(found: Rating) -> dict[str, Any]:
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


def _show(found: Rating) -> None:
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
