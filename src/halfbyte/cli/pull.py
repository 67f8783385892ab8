"""`halfbyte pull`: a model from a hub, every file checked by hash."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress

if TYPE_CHECKING:
    from halfbyte.formats.hub import HubId


@click.command("pull")
@click.argument("name")
@flags.HUB
@flags.JSON
def command(name: str, hub: HubId, as_json: bool) -> None:
    """Fetch NAME (org/name, org/name:Q4_0 for one GGUF, org/name@revision) and print its path.

    Honours HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, MODELSCOPE_ENDPOINT and
    MODELSCOPE_API_TOKEN. What was begun is resumed.
    """
    from halfbyte.formats.hub import pull

    with progress("fetching", in_bytes=True) as report:
        path = pull(name, report, hub=hub)
    if as_json:
        document("pull", {"name": name, "from": hub, "path": str(path)})
    else:
        click.echo(path)
