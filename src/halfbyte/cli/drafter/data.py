"""The flags that those verbs share which make a target speak."""

from __future__ import annotations

from pathlib import Path

import click

EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
TARGET = click.argument("target")
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
