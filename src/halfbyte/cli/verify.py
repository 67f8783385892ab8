"""`halfbyte verify`: every byte against the manifest beside a model, or against the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress

if TYPE_CHECKING:
    from halfbyte.formats.hub import HubId


@click.command("verify")
@click.argument("model")
@flags.HUB
@flags.JSON
def command(model: str, hub: HubId, as_json: bool) -> None:
    """Hash MODEL (a path with a manifest, or a hub name) and compare; exit 4 on a difference."""
    from halfbyte.formats import manifest, reference
    from halfbyte.formats.hub import verify_hub

    path = Path(model).expanduser()
    with progress("hashing", in_bytes=True) as report:
        if model == reference.DEMO:
            files = manifest.verify(reference.demo_path(), report)
        elif path.exists():
            files = manifest.verify(path, report)
        else:
            files = verify_hub(model, report, hub=hub)
    if as_json:
        document("verify", {"model": model, "files": files, "ok": True})
    else:
        click.echo(f"ok: {files} {'file' if files == 1 else 'files'}")
