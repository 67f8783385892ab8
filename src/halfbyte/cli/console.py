"""Where a verb speaks: documents on stdout, talk and progress bars on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from halfbyte import env
from halfbyte.errors import GateMissedError

if TYPE_CHECKING:
    from halfbyte.training.loop import Standing, Tell
    from halfbyte.workflows import Verdict

SILENCE_S = 10.0

Report = Callable[[int, int], None]


def document(verb: str, fields: Mapping[str, Any]) -> None:
    """One JSON document on stdout, with its schema first."""
    text = json.dumps({"schema": f"halfbyte.{verb}/1", **fields}, ensure_ascii=False)
    click.echo(text)


def note(text: str) -> None:
    """A line of talk on stderr."""
    click.echo(text, err=True, color=colour())


def complain(error: Exception) -> None:
    """An error on stderr: its text and nothing else."""
    note(f"{click.style('error:', fg='red')} {error}")


def judge(verdict: Verdict) -> None:
    """Tells of a gate that was missed, and raises."""
    for miss in verdict.misses:
        note(f"missed: {miss.sentence}")
    for cause in verdict.causes:
        note(f"likely cause: {cause}")
    for remedy in verdict.remedies:
        note(f"what would help: {remedy}")
    if not verdict.passed:
        raise GateMissedError(
            f"{len(verdict.misses)} of the gate's numbers missed, "
            f"{len(verdict.differing)} differences from the reference",
            hint="docs/troubleshooting.md goes from causes to cures",
        )


def typed() -> str:
    """The command line as it may be shown to others: where files lay is nobody else's business."""
    return shlex.join(["halfbyte", *map(_without_folders, sys.argv[1:])])


def _without_folders(argument: str) -> str:
    name, equals, path = argument.rpartition("=")
    is_path = bool(path) and (Path(path).is_absolute() or Path(path).exists())
    return f"{name}{equals}{Path(path).resolve().name}" if is_path else argument


def colour() -> bool | None:
    """For click's `color`: never where NO_COLOR is set, else where the stream is a terminal."""
    return False if env.no_color() else None


@contextmanager
def progress(title: str, *, in_bytes: bool = False) -> Generator[Report]:
    """A bar on stderr while the block runs; give it (done, total), in any unit.

    With `in_bytes` it shows them, and their rate. Where stderr is not a terminal it is one line
    every ten seconds.
    """
    if sys.stderr.isatty():
        with _bar(title, in_bytes) as report:
            yield report
    else:
        yield _lines(title, in_bytes)


@contextmanager
def _bar(title: str, in_bytes: bool) -> Generator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    sizes = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else ()
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), *sizes, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str, in_bytes: bool) -> Report:
    last = [monotonic()]

    def report(done: int, total: int) -> None:
        if monotonic() - last[0] >= SILENCE_S and total:
            last[0] = monotonic()
            of = f" of {total / 1e9:.3g} GB" if in_bytes else ""
            note(f"{title} {100 * done / total:.0f} %{of}")

    return report


@contextmanager
def course(title: str) -> Generator[Tell]:
    """How training goes, on stderr while the block runs: a bar and its figures, or a line every ten
    seconds."""
    if sys.stderr.isatty():
        with _training_bar(title) as tell:
            yield tell
    else:
        yield _training_lines(title)


@contextmanager
def _training_bar(title: str) -> Generator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda it: bar.update(
            task, completed=it.step, total=it.steps, description=_figures(title, it)
        )


def _training_lines(title: str) -> Tell:
    last = [monotonic()]

    def tell(it: Standing) -> None:
        if monotonic() - last[0] >= SILENCE_S or it.step == it.steps:
            last[0] = monotonic()
            note(f"{_figures(title, it)}, {it.left_s / 60:.1f} min left")

    return tell


def _figures(title: str, it: Standing) -> str:
    return (
        f"{title} {it.step}/{it.steps}: loss {it.loss:.4f}, held out {it.measure:.4f} "
        f"(best {it.best:.4f}), {it.tokens_per_s:,.0f} tokens/s"
    )
