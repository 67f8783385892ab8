"""Where a verb speaks: documents on stdout, talk and progress bars on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

import click

SILENCE_S = 10.0

Report = Callable[[int, int], None]


def document(verb: str, fields: Mapping[str, Any]) -> None:
    """One JSON document on stdout, with its schema first."""
    text = json.dumps({"schema": f"halfbyte.{verb}/1", **fields}, ensure_ascii=False)
    click.echo(text)


def note(text: str) -> None:
    """A line of talk on stderr."""
    click.echo(text, err=True)


@contextmanager
def progress(title: str) -> Generator[Report]:
    """A bar on stderr while the block runs; give it (done, total), in any unit.

    Where stderr is not a terminal it is one line every ten seconds.
    """
    if sys.stderr.isatty():
        with _bar(title) as report:
            yield report
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Generator[Report]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(title: str) -> Report:
    last = [monotonic()]

    def report(done: int, total: int) -> None:
        if monotonic() - last[0] >= SILENCE_S and total:
            last[0] = monotonic()
            note(f"{title} {100 * done / total:.0f} %")

    return report
