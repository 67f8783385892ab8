"""`halfbyte bench`: tokens per second, load time, memory, and the share of the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress
from halfbyte.cli.values import gib, length, shares
from halfbyte.specs import AUTO

if TYPE_CHECKING:
    from halfbyte.evals.bench import Row
    from halfbyte.formats.checkpoint import Source
    from halfbyte.models.decoder import Decoder
    from halfbyte.models.drafter import DraftModel


def lengths(value: str) -> list[int]:
    """Several lengths: 128,512,2k. A depth may be 0."""
    return [0 if part == "0" else length(part) for part in value.split(",")]


@click.command("bench")
@flags.MODEL
@click.option("--prefill", type=lengths, help="Prompts.  [default: those of 128,512,2048 that fit]")
@click.option("--decode", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--depth", type=lengths, help="Tokens before.  [default: those of 0,4096 that fit]")
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DRAFTER
@click.option(
    "--synthetic-rates",
    "rates",
    type=shares,
    metavar="P,P,...",
    help="Also time rounds of drafts (speculate@D): how often the first is accepted, the second, "
    "... of all rounds.",
)
@flags.DEVICE
@flags.CARD_LAYERS
@flags.JSON
def command(
    model: str,
    prefill: Sequence[int] | None,
    decode: int,
    depth: Sequence[int] | None,
    kv: Any,
    drafter: str,
    rates: Sequence[float] | None,
    device: str,
    dtype: Any,
    threads: int | None,
    card_layers: int | None,
    as_json: bool,
) -> None:
    """Time MODEL: prompts (prefill@N), tokens behind a depth (decode@D), several rows (rows@M).

    The last line on stdout is one JSON document; with --json it is the only one.
    """
    if drafter != AUTO and rates is None:
        raise click.UsageError("--drafter is timed at --synthetic-rates")
    from halfbyte.evals.bench import bench, standard, step_bytes
    from halfbyte.evals.speculation import speculate
    from halfbyte.formats.reference import locate
    from halfbyte.kernels.choice import choose, choose_front
    from halfbyte.models.load import load
    from halfbyte.planner.probe import peak_bytes, resident_bytes
    from halfbyte.quantizer.opening import open_source

    before = resident_bytes()
    start = perf_counter()
    source = open_source(model)
    front = choose_front(source.spec, device, card_layers, dtype, threads=threads)
    decoder = load(source, choose(source.spec, device, dtype, threads=threads), front=front)
    load_s, weights_bytes = perf_counter() - start, decoder.packed_bytes
    drafts = None if rates is None else _drafter(drafter, source, locate(model), decoder)
    trials = standard(source.spec.context, prefill=prefill, depths=depth, decode=decode)
    with progress("timing") as report:
        rows = bench(decoder, trials, decode=decode, kv=kv, progress=report)
    if drafts is not None and rates is not None:
        depths = [trial.count for trial in trials if trial.kind == "decode"]
        rows += [
            speculate(decoder, drafts, rates, depth=depth, rounds=decode, kv=kv) for depth in depths
        ]
    facts = {
        "rows": [asdict(row) for row in rows],
        "ops": decoder.name,
        "load_s": load_s,
        "weights_bytes": weights_bytes,
        "step_bytes": step_bytes(source),
        "peak_bytes": max(0, peak_bytes() - before),
        **_bandwidth(_read_bandwidth(decoder), rows, step_bytes(source)),
    }
    if not as_json:
        _table(facts)
    document("bench", facts)


def _drafter(reference: str, source: Source, place: Path, decoder: Decoder) -> DraftModel:
    from halfbyte.models.load import load_drafter
    from halfbyte.quantizer.opening import open_drafter

    found = open_drafter(reference, source, place)
    if found is None:
        raise click.UsageError("there is no drafter beside the model; name one with --drafter")
    return load_drafter(found, decoder)


def _read_bandwidth(decoder: Decoder) -> float | None:
    """What memory gives; of a model in two memories no one figure."""
    return decoder.ops.read_bandwidth() if decoder.front is None else None


def _bandwidth(measured: float | None, rows: Sequence[Row], needed: int) -> dict[str, Any]:
    """What memory gives, and the share of it that decoding uses at the first depth."""
    decode = next(row for row in rows if row.test.startswith("decode@"))
    return {
        "read_bandwidth_bytes_per_s": measured,
        "bandwidth_share": measured and needed / decode.median_s / measured,
    }


def _table(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['ops']}, {gib(facts['weights_bytes'])} of weights")
    seconds = {row["test"]: row["median_s"] for row in facts["rows"]}
    for row in facts["rows"]:
        times = row["median_s"] / seconds["rows@1"]
        click.echo(
            f"  {row['test']:14} {row['tokens_per_s']:10.1f} tokens/s"
            f"  {1000 * row['median_s']:9.3f} ms, median of {row['n']}"
            + (f", {times:.2f} of one row" if row["test"].startswith("rows@") else "")
        )
    bandwidth = facts["read_bandwidth_bytes_per_s"]
    if bandwidth:
        click.echo(
            f"  memory read at {bandwidth / 1e9:.1f} GB/s; "
            f"decoding at the first depth uses {facts['bandwidth_share']:.0%} of it"
        )
    click.echo(f"  loaded in {facts['load_s']:.2f} s, peak {gib(facts['peak_bytes'])}")
