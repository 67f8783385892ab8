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
@click.option(
    "--lattice/--no-lattice",
    default=True,
    help="Keep matrices that lie on a Q4_0 lattice as they are (the default), or round them anew.",
)
@flags.JSON
def command(
    model: str, target: Path, recipe: str, method: Any, lattice: bool, as_json: bool
) -> None:
    """Quantize MODEL on the grid that ships; what is written is what runs."""
    from halfbyte import workflows

    with progress("quantizing") as report:
        made = workflows.quantize(
            model, target, recipe=recipe, method=method, lattice=lattice, progress=report
        )
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
                "lattice": made.details.get("lattice"),
            },
        )
        return
    click.echo(made.path)
    if "lattice" in made.details:
        note(_on_lattice(**made.details["lattice"]))
    note(f"{gib(made.source_bytes)} became {gib(made.bytes)}; manifest: {made.manifest.name}")
    note(f"next: halfbyte run {made.path}")


def _on_lattice(matrices: int, exact: int, near: int, searched: int) -> str:
    """What became of the matrices that lay on a lattice."""
    blocks = exact + near + searched
    parts = [f"{exact:,} of {blocks:,} blocks bit for bit"]
    parts += [f"{near:,} with the nearest scale"] if near else []
    parts += [f"{searched:,} were on none and took the best one"] if searched else []
    return f"{matrices} matrices lie on a Q4_0 lattice and stay on it: {', '.join(parts)}"
