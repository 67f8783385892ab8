"""`halfbyte export`: the same tensors in another program's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.cli.values import gib

if TYPE_CHECKING:
    from halfbyte.workflows import Form


@click.command("export")
@flags.MODEL
@click.option(
    "--to",
    "form",
    type=click.Choice(["gguf", "compressed-tensors", "ollama", "lmstudio"]),
    required=True,
    help="gguf: llama.cpp. compressed-tensors: Transformers and vLLM (W4A16).",
)
@click.option(
    "-o",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="gguf: X.gguf or a directory. compressed-tensors, ollama: a new directory. "
    "lmstudio: its folder of models.",
)
@flags.JSON
def command(model: str, form: Form, target: Path, as_json: bool) -> None:
    """Write MODEL for another program, its tensors exactly as they are stored."""
    from halfbyte import workflows

    with progress("exporting") as report:
        made = workflows.export(model, target, form, progress=report)
    if as_json:
        fields = {"path": str(made.path), "manifest": str(made.manifest), "bytes": made.bytes}
        document("export", {"to": form, **fields, "notes": list(made.notes)})
        return
    click.echo(made.path)
    note(f"{gib(made.bytes)}, manifest: {made.manifest.name}")
    for line in made.notes:
        note(line)
