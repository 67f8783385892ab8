"""`halfbyte pull`: a model from a hub, every file checked by hash."""

from __future__ import annotations

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress


@click.command("pull")
@click.argument("name")
@flags.JSON
def command(name: str, as_json: bool) -> None:
    """Fetch NAME (org/name, or org/name:Q4_0 for one GGUF) into the hub's cache.

    Honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. What was begun is resumed.
    """
    from halfbyte.formats import hub

    with progress("fetching") as report:
        path = hub.pull(name, report)
    if as_json:
        document("pull", {"name": name, "path": str(path)})
    else:
        click.echo(path)
