"""`halfbyte eval`: perplexity of a model on texts, and KL and top-1 against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.errors import GateMissedError

if TYPE_CHECKING:
    from halfbyte.evals.fidelity import Fidelity
    from halfbyte.evals.gate import Miss


@click.command("eval")
@flags.MODEL
@click.option("--against", help="The reference: usually the model before it was quantized.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A UTF-8 text to measure on; may be repeated.",
)
@click.option(
    "--protocol",
    type=click.Choice(["llama.cpp", "full"]),
    default="llama.cpp",
    show_default=True,
    help="llama.cpp: the second half of each window is scored. full: every token.",
)
@click.option("--window", type=click.IntRange(min=4), default=512, show_default=True)
@click.option("--max-windows", type=click.IntRange(min=1), help="Stop after so many windows.")
@click.option(
    "--gate",
    "gate_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A TOML file of thresholds; a miss exits 7.",
)
@click.option("--recipe", help="Quantize an unquantized model while loading it.")
@flags.METHOD
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def command(
    model: str,
    against: str | None,
    texts: tuple[Path, ...],
    protocol: Any,
    window: int,
    max_windows: int | None,
    gate_file: Path | None,
    recipe: str | None,
    method: Any,
    kv: Any,
    device: str,
    dtype: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL on texts, alone or --against a reference."""
    from halfbyte import workflows
    from halfbyte.evals.gate import misses, read_gate
    from halfbyte.specs import LoadOptions

    gate = None if gate_file is None else read_gate(gate_file)
    options = LoadOptions(
        recipe=recipe, method=method, device=device, dtype=dtype, kv=kv, threads=threads
    )
    with progress("measuring") as report:
        measured = workflows.evaluate(
            model,
            texts,
            options=options,
            against=against,
            protocol=protocol,
            window=window,
            max_windows=max_windows,
            progress=report,
        )
    missed = [] if gate is None else misses(gate, measured)
    if as_json:
        document("eval", _fields(measured, protocol, window, None if gate is None else missed))
    else:
        _table(measured)
    _judge(missed)


def _fields(
    measured: Sequence[Fidelity], protocol: str, window: int, missed: Sequence[Miss] | None
) -> dict[str, Any]:
    gate = None if missed is None else {"passed": not missed, "misses": [*map(asdict, missed)]}
    texts = [asdict(text) for text in measured]
    return {"protocol": protocol, "window": window, "texts": texts, "gate": gate}


def _table(measured: Sequence[Fidelity]) -> None:
    for text in measured:
        click.echo(f"{text.name}: {text.tokens} tokens scored")
        click.echo(f"  perplexity      {text.perplexity:.4f} +- {text.perplexity_error:.4f}")
        if text.reference_perplexity is None or text.kl is None or text.same_top1 is None:
            continue
        rise = text.perplexity / text.reference_perplexity - 1
        click.echo(f"  of reference    {text.reference_perplexity:.4f} ({rise:+.2%})")
        click.echo(f"  KL mean         {text.kl.mean:.6f} +- {text.kl.mean_error:.6f}")
        click.echo(f"  KL median, p99  {text.kl.median:.6f}, {text.kl.p99:.6f}")
        click.echo(f"  same top-1      {text.same_top1:.2%}")


def _judge(missed: Sequence[Miss]) -> None:
    if not missed:
        return
    for miss in missed:
        note(f"missed: {miss.number} on {miss.text} is {miss.measured:.6g}, not {miss.threshold:g}")
    raise GateMissedError(
        f"{len(missed)} of the gate's numbers missed",
        hint="a larger recipe (q8_0), --method search, or another threshold",
    )
