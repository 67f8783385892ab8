"""`halfbyte top`: what halfbyte's processes take, beside what was planned for them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count as numbers
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document
from halfbyte.cli.values import gib

if TYPE_CHECKING:
    from halfbyte.planner.monitor import Sample

Show = Callable[[Sequence["Sample"]], None]
HEADINGS = ("pid", "model", "planned", "measured", "resident", "peak", "on cards")


@click.command("top")
@click.option("--pid", "pids", type=int, multiple=True, help="These processes only.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many looks.")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write every sample to a file, too.",
)
@flags.JSON
def command(
    pids: tuple[int, ...], interval: float, count: int | None, csv_file: Path | None, as_json: bool
) -> None:
    """Show the memory of loaded models, live, until Ctrl-C: what was planned, what is taken.

    "measured" is what a process grew by since before it loaded its model, on cards, too; a plan
    counts the same. With --json the samples come as one document at the end, by default of one
    look.
    """
    from halfbyte.planner.monitor import Table, sample, samples

    for pid in pids:
        sample(pid)  # one that is not there is an error here, and may end later
    table = None if csv_file is None else Table(csv_file)
    seen: list[Sample] = []
    rounds = numbers() if count is None and not as_json else range(count or 1)
    with _shown(silent=as_json) as show:
        try:
            for number in rounds:
                if number:
                    sleep(interval)
                found = samples(pids or _ours())
                show(found)
                seen += found if as_json else ()
                for it in found if table is not None else ():
                    assert table is not None
                    table.add(it)
        except KeyboardInterrupt:  # the way to end it
            pass
        finally:
            if table is not None:
                table.close()
    if as_json:
        document("top", {"memory": asdict(_memory()), "samples": [_fields(it) for it in seen]})


def _ours() -> list[int]:
    """Processes that have announced a model, and those of the command halfbyte."""
    from halfbyte.planner.probe_system import processes_named
    from halfbyte.planner.running import running

    return sorted({*(it.pid for it in running()), *processes_named("halfbyte")})


def _memory() -> Any:
    from halfbyte.planner.probe_system import memory

    return memory()


def _fields(it: Sample) -> dict[str, Any]:
    return {**asdict(it), "measured_bytes": it.measured_bytes}


@contextmanager
def _shown(*, silent: bool) -> Generator[Show]:
    """Where samples are shown: nowhere, in a table that is drawn over, or line by line."""
    if silent:
        yield lambda found: None
        return
    if not sys.stdout.isatty():
        yield _say
        return
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        yield lambda found: live.update(_table(found), refresh=True)


def _say(found: Sequence[Sample]) -> None:
    click.echo(_machine(found))
    for it in found:
        click.echo("  " + "  ".join(f"{h} {c}" for h, c in zip(HEADINGS, _cells(it), strict=True)))


def _table(found: Sequence[Sample]) -> Any:
    from rich.table import Table

    table = Table(title=_machine(found), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for it in found:
        table.add_row(*_cells(it))
    return table


def _machine(found: Sequence[Sample]) -> str:
    memory = _memory()
    text = f"{gib(memory.available)} of {gib(memory.total)} free"
    if not found:
        return f"{text}; no model is loaded"
    first = found[0]
    cards = f", cards {gib(first.cards_used_bytes)} of {gib(first.cards_bytes)} used"
    return text + (cards if first.cards_bytes else "")


def _cells(it: Sample) -> list[str]:
    planned = gib(it.planned_bytes) if it.planned_bytes else "-"
    return [
        str(it.pid),
        it.name,
        planned,
        gib(it.measured_bytes) if it.planned_bytes else "-",
        gib(it.resident_bytes),
        gib(it.peak_bytes),
        "?" if it.card_bytes is None else gib(it.card_bytes),
    ]
