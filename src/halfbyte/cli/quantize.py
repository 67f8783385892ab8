"""`halfbyte quantize`: a checkpoint becomes a smaller GGUF with its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.cli.values import gib


@click.command("quantize")
@flags.MODEL
@click.option(
    "-o",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="X.gguf, or a directory that gets model.gguf and manifest.json.",
)
@click.option(
    "--recipe",
    default="q4_0",
    show_default=True,
    help="q4_0, q4_0-pure, q8_0, bf16, f16, f32, or a .toml file with a [rules] table.",
)
@flags.METHOD
@flags.JSON
def command(model: str, target: Path, recipe: str, method: Any, as_json: bool) -> None:
    """Quantize MODEL on the grid that ships; what is written is what runs."""
    from halfbyte import workflows

    with progress("quantizing") as report:
        made = workflows.quantize(model, target, recipe=recipe, method=method, progress=report)
    if as_json:
        document(
            "quantize",
            {
                "path": str(made.path),
                "manifest": str(made.manifest),
                "recipe": recipe,
                "method": method,
                "bytes": made.bytes,
                "source_bytes": made.source_bytes,
            },
        )
        return
    click.echo(made.path)
    note(f"{gib(made.source_bytes)} became {gib(made.bytes)}; manifest: {made.manifest.name}")
    note(f"next: halfbyte run {made.path}")
