"""`halfbyte draft`: a drafter for a target: trained, measured, and cut to what the target says."""

from __future__ import annotations

import click

from halfbyte.cli.drafter import rating, shortlist, train


@click.group("draft")
def command() -> None:
    """A drafter for TARGET: several tokens from one forward, the same text."""


for _verb in (train.command, rating.command, shortlist.command):
    command.add_command(_verb)
