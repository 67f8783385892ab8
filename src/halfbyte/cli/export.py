"""`halfbyte export`: the same tensors in another file format."""

from __future__ import annotations

from pathlib import Path

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.cli.values import gib


@click.command("export")
@flags.MODEL
@click.option("--to", "form", type=click.Choice(["gguf"]), required=True, help="The format.")
@click.option(
    "-o",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="X.gguf, or a directory that gets model.gguf and manifest.json.",
)
@flags.JSON
def command(model: str, form: str, target: Path, as_json: bool) -> None:
    """Write MODEL in another format, its tensors exactly as they are stored."""
    from halfbyte import workflows

    with progress("exporting") as report:
        made = workflows.export_gguf(model, target, progress=report)
    if as_json:
        fields = {"path": str(made.path), "manifest": str(made.manifest), "bytes": made.bytes}
        document("export", {"to": form, **fields})
        return
    click.echo(made.path)
    note(f"{gib(made.bytes)}, manifest: {made.manifest.name}")
