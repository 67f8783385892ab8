"""`halfbyte compare`: before and after in one table: memory, latency, throughput, fidelity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress
from halfbyte.cli.values import gib, named_files

if TYPE_CHECKING:
    from halfbyte.evals.fidelity import Fidelity
    from halfbyte.workflows import Side

Row = tuple[str, list[str]]


@click.command("compare")
@click.argument("base")
@click.argument("quants", metavar="QUANT...", nargs=-1, required=True)
@flags.READING
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def command(
    base: str,
    quants: tuple[str, ...],
    texts: tuple[str, ...],
    protocol: Any,
    window: int,
    max_windows: int | None,
    rounds: int,
    kv: Any,
    device: str,
    dtype: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """Set BASE beside one QUANT or several: what is gained, and what is lost.

    Speed and memory are those of `bench`, each in a process of its own, in turns of --rounds.
    """
    from halfbyte.evals.texts import Reading
    from halfbyte.specs import LoadOptions
    from halfbyte.workflows import compare

    with progress("comparing") as report:
        sides = compare(
            base,
            quants,
            texts=named_files(texts),
            reading=Reading(protocol=protocol, window=window, max_windows=max_windows),
            rounds=rounds,
            options=LoadOptions(device=device, dtype=dtype, kv=kv, threads=threads),
            progress=report,
        )
    if as_json:
        document("compare", {"models": [_fields(side) for side in sides]})
    else:
        for line in table(sides):
            click.echo(line)


def _fields(side: Side) -> dict[str, Any]:
    return {**asdict(side), "bits_per_weight": side.bits_per_weight}


def table(sides: Sequence[Side]) -> Iterator[str]:
    """A line for each number, a column for each model."""
    rows = [*_rows(sides)]
    labels = max(len(label) for label, _ in rows)
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in rows), strict=True)]
    for label, cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"{label:{labels}}  {'  '.join(padded)}".rstrip()


def _rows(sides: Sequence[Side]) -> Iterator[Row]:
    """A label and a cell for each model; of numbers that have one, the ratio to the base."""
    first = sides[0]
    yield "", [side.name.rstrip("/").rpartition("/")[2] for side in sides]
    yield _row(sides, "stored", lambda s: s.stored_bytes, gib, first)
    yield "bits per weight", [f"{side.bits_per_weight:.2f}" for side in sides]
    yield _row(sides, "in memory", lambda s: s.weights_bytes, gib, first)
    yield _row(sides, "peak memory", lambda s: s.peak_bytes, gib, first)
    yield _row(sides, "loading", lambda s: s.load_s, "{:.2f} s".format, first)
    yield _row(sides, "a token takes", lambda s: 1000 * s.token_s, "{:.2f} ms".format, first)
    yield _row(sides, "prompt, tokens/s", lambda s: s.prompt_tokens_per_s, "{:.0f}".format, first)
    yield _row(sides, "decode, tokens/s", lambda s: s.decode_tokens_per_s, "{:.1f}".format, first)
    for index, text in enumerate(sides[1].texts):
        yield f"{text.name}:", ["" for _ in sides]
        yield from _fidelity_rows([side.texts[index] for side in sides[1:]])


def _row(
    sides: Sequence[Side],
    label: str,
    number: Callable[[Side], float],
    shown: Callable[[Any], str],
    first: Side,
) -> Row:
    cells = [shown(number(first))]
    for side in sides[1:]:
        ratio = f"  x{number(side) / number(first):.2f}" if number(first) else ""
        cells.append(shown(number(side)) + ratio)
    return label, cells


def _fidelity_rows(texts: Sequence[Fidelity]) -> Iterator[Row]:
    yield (
        "  perplexity",
        [
            f"{texts[0].reference_perplexity:.3f}",
            *(f"{t.perplexity:.3f}  {(t.perplexity_ratio or 0) - 1:+.2%}" for t in texts),
        ],
    )
    yield "  KL, mean", ["", *(f"{t.kl.mean:.5f}" if t.kl else "" for t in texts)]
    yield "  KL, p99", ["", *(f"{t.kl.p99:.5f}" if t.kl else "" for t in texts)]
    yield "  same top-1", ["", *(f"{t.same_top1:.2%}" for t in texts)]
