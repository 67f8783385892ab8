"""`halfbyte bench`: tokens per second, load time, memory, and the share of the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from time import perf_counter
from typing import Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress
from halfbyte.cli.values import gib, length


def lengths(value: str) -> list[int]:
    """Several lengths: 128,512,2k. A depth may be 0."""
    return [0 if part == "0" else length(part) for part in value.split(",")]


@click.command("bench")
@flags.MODEL
@click.option("--prefill", type=lengths, default="128,512", show_default=True, help="Prompts.")
@click.option("--decode", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--depth", type=lengths, default="0", show_default=True, help="Tokens before.")
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def command(
    model: str,
    prefill: Sequence[int],
    decode: int,
    depth: Sequence[int],
    kv: Any,
    device: str,
    dtype: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """Time MODEL: prompts (prefill@N), tokens behind a depth (decode@D), several rows (rows@M).

    The last line on stdout is one JSON document; with --json it is the only one.
    """
    from halfbyte.evals.bench import bench
    from halfbyte.kernels.choice import choose
    from halfbyte.models.load import load
    from halfbyte.planner.probe import peak_bytes, resident_bytes
    from halfbyte.quantizer.opening import open_source

    before = resident_bytes()
    start = perf_counter()
    source = open_source(model)
    ops = choose(source.spec, device, dtype, threads=threads)
    decoder = load(source, ops)
    load_s = perf_counter() - start
    with progress("timing") as report:
        rows = bench(decoder, prefill=prefill, decode=decode, depths=depth, kv=kv, progress=report)
    peak = max(0, peak_bytes() - before)
    facts = {
        "rows": [asdict(row) for row in rows],
        "ops": ops.name,
        "load_s": load_s,
        "weights_bytes": ops.packed_bytes,
        "read_bandwidth_bytes_per_s": ops.read_bandwidth(),
        "peak_bytes": peak,
    }
    if not as_json:
        _table(facts)
    document("bench", facts)


def _table(facts: dict[str, Any]) -> None:
    click.echo(f"{facts['ops']}, {gib(facts['weights_bytes'])} of weights")
    for row in facts["rows"]:
        click.echo(
            f"  {row['test']:14} {row['tokens_per_s']:10.1f} tokens/s"
            f"  {1000 * row['median_s']:9.3f} ms, median of {row['n']}"
        )
    decode = next(row for row in facts["rows"] if row["test"].startswith("decode@"))
    bandwidth = facts["read_bandwidth_bytes_per_s"]
    if bandwidth:
        share = facts["weights_bytes"] / decode["median_s"] / bandwidth
        click.echo(f"  memory read at {bandwidth / 1e9:.1f} GB/s; decoding uses {share:.0%} of it")
    click.echo(f"  loaded in {facts['load_s']:.2f} s, peak {gib(facts['peak_bytes'])}")
