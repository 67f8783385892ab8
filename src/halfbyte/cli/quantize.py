"""`halfbyte quantize`: a checkpoint becomes a smaller GGUF with its manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, judge, note, progress, typed
from halfbyte.cli.values import gib, size

if TYPE_CHECKING:
    from halfbyte.workflows import Artefact, Conclusion

EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("quantize")
@flags.MODEL
@click.option(
    "-o",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="X.gguf, or a directory that gets model.gguf, manifest.json and a report.",
)
@click.option(
    "--recipe",
    default="q4_0",
    show_default=True,
    help="q4_0, q4_0-pure, q8_0, bf16, f16, f32, or a .toml file with a [rules] table.",
)
@click.option(
    "--size",
    "budget",
    type=size,
    help="What all tensors may take (6.7GB, 512MiB): each matrix gets what costs least within it. "
    "Needs --calib.",
)
@click.option(
    "--method",
    type=click.Choice(["rtn", "search", "gptq", "yaqa", "awq", "signround"]),
    help="rtn: the format's reference rule. search: the scales of least error. The others need "
    "--calib; yaqa is the closest to the original, and takes a few times as long as gptq. "
    "[default: gptq with --calib, else search]",
)
@click.option(
    "--calib",
    multiple=True,
    type=EXISTING,
    metavar="FILE",
    help="A text, or .jsonl conversations, to calibrate on; several are mixed.",
)
@click.option(
    "--held-out",
    multiple=True,
    type=EXISTING,
    metavar="FILE",
    help="What MODEL will be measured on: calibration that holds some of it is refused.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Windows to calibrate on.",
)
@click.option(
    "--window",
    type=click.IntRange(min=32),
    default=512,
    show_default=True,
    help="Tokens of a window.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Which windows are taken.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:INDEX.")
@click.option("--threads", type=click.IntRange(min=1), help="Compute threads.")
@click.option(
    "--lattice/--no-lattice",
    default=True,
    help="Keep matrices that lie on a Q4_0 lattice as they are (the default), or round them anew.",
)
@click.option(
    "--report/--no-report",
    "reports",
    default=True,
    help="Measure what goes into a directory against MODEL, and say so in a report (the default).",
)
@flags.JSON
def command(
    model: str,
    target: Path,
    recipe: str,
    budget: int | None,
    method: Any,
    calib: tuple[Path, ...],
    held_out: tuple[Path, ...],
    samples: int,
    window: int,
    seed: int,
    device: str,
    threads: int | None,
    lattice: bool,
    reports: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL on the grid that ships; what is written is what runs.

    A calibrated run that was stopped goes on where it was when it is started again. Into a
    directory goes the proof, too; a model that misses its gate is kept, and the exit code is 7.
    """
    from halfbyte import workflows
    from halfbyte.quantizer.calibrate import Sampling

    calibrating = workflows.Calibrating(
        files=calib,
        sampling=Sampling(samples=samples, window=window, seed=seed),
        held_out=held_out,
        device=device,
        threads=threads,
    )
    with progress("quantizing") as report:
        made = workflows.quantize(
            model,
            target,
            recipe=recipe,
            size=budget,
            method=method,
            calibrating=calibrating if calib else None,
            lattice=lattice,
            progress=report,
        )
    told = _conclude(target, model, device, threads) if reports and target.is_dir() else None
    if as_json:
        document(
            "quantize",
            {
                "path": str(made.path),
                "manifest": str(made.manifest),
                "recipe": recipe,
                "method": made.method,
                "bytes": made.bytes,
                "source_bytes": made.source_bytes,
                "lattice": made.details.get("lattice"),
                "allocation": made.details.get("allocation"),
                "report": None if told is None else str(told.page),
                "passed": None if told is None else told.verdict.passed,
            },
        )
    else:
        _show(made)
    if told is not None:
        note(f"report: {told.page}")
        judge(told.verdict)


def _conclude(target: Path, model: str, device: str, threads: int | None) -> Conclusion:
    from halfbyte import workflows
    from halfbyte.specs import LoadOptions

    options = LoadOptions(device=device, threads=threads)
    with progress("measuring") as report:
        return workflows.conclude(target, model, made_by=typed(), options=options, progress=report)


def _show(made: Artefact) -> None:
    click.echo(made.path)
    if "allocation" in made.details:
        note(_front(made.details["allocation"]))
    if "lattice" in made.details:
        note(_on_lattice(**made.details["lattice"]))
    note(f"{gib(made.source_bytes)} became {gib(made.bytes)}; manifest: {made.manifest.name}")
    note(f"next: halfbyte run {made.path}")


def _front(allocation: Mapping[str, Any]) -> str:
    """What each size would bring, and what was chosen."""
    lines = [f"{gib(p['bytes']):>12}   {p['predicted_kl']:.5f}" for p in allocation["front"]]
    counts = Counter(allocation["schemes"].values())
    chosen = ", ".join(f"{count} x {scheme}" for scheme, count in counts.most_common())
    return "\n".join(
        [
            "   all tensors   predicted KL (nats per token)",
            *lines,
            f"chosen: {gib(allocation['bytes'])}, {allocation['predicted_kl']:.5f}: {chosen}",
        ]
    )


def _on_lattice(matrices: int, exact: int, near: int, searched: int) -> str:
    """What became of the matrices that lay on a lattice."""
    blocks = exact + near + searched
    parts = [f"{exact:,} of {blocks:,} blocks bit for bit"]
    parts += [f"{near:,} with the nearest scale"] if near else []
    parts += [f"{searched:,} were on none and took the best one"] if searched else []
    return f"{matrices} matrices lie on a Q4_0 lattice and stay on it: {', '.join(parts)}"
