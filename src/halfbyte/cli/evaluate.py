"""`halfbyte eval`: perplexity of a model on texts, and KL and top-1 against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.errors import GateMissedError, InvalidInputError

if TYPE_CHECKING:
    from halfbyte.evals.fidelity import Fidelity
    from halfbyte.evals.gate import Miss
    from halfbyte.workflows import Comparison

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate says of a model; without a gate, what differs from the reference."""

    failed: bool
    missed: Sequence[Miss]
    differing: Sequence[str]
    causes: Sequence[str]


@click.command("eval")
@flags.MODEL
@click.option("--against", help="The reference: usually the model before it was quantized.")
@click.option("--lora", metavar="PATH[@SCALE]", help="Measure MODEL with this LoRA adapter.")
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
    "gate_name",
    metavar="FILE|default",
    help="A TOML file of thresholds, or ours for how MODEL is stored; a miss exits 7.",
)
@click.option("--recipe", help="Quantize an unquantized model while loading it.")
@flags.METHOD
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def command(
    model: str,
    against: str | None,
    lora: str | None,
    texts: tuple[Path, ...],
    protocol: Any,
    window: int,
    max_windows: int | None,
    gate_name: str | None,
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
    from halfbyte.specs import LoadOptions

    options = LoadOptions(
        recipe=recipe, method=method, device=device, dtype=dtype, kv=kv, threads=threads
    )
    pair = None if against is None else workflows.compare(model, against, options=options)
    gate = _gate(gate_name, pair)
    if lora is not None:
        note(f"with {lora}: adapters run in the reference op set")
    with progress("measuring") as report:
        measured = workflows.evaluate(
            model,
            texts,
            options=options,
            lora=lora,
            against=against,
            protocol=protocol,
            window=window,
            max_windows=max_windows,
            progress=report,
        )
    verdict = _verdict(gate, measured, pair, strict=gate_name == DEFAULT)
    if as_json:
        document("eval", _fields(measured, protocol, window, None if gate is None else verdict))
    else:
        _table(measured)
    _judge(verdict)


def _gate(name: str | None, pair: Comparison | None) -> dict[str, float] | None:
    from halfbyte.evals.gate import read_gate

    if name is None:
        return None
    if name != DEFAULT:
        return read_gate(Path(name))
    if pair is None:
        raise InvalidInputError("the default gate needs a reference", hint="use --against")
    return pair.gate()


def _verdict(
    gate: Mapping[str, float] | None,
    measured: Sequence[Fidelity],
    pair: Comparison | None,
    *,
    strict: bool,
) -> Verdict:
    """`strict`: a model that describes itself otherwise than its reference misses, too."""
    from halfbyte.evals.gate import misses

    missed = [] if gate is None else misses(gate, measured)
    differing = [] if pair is None else pair.differences()
    failed = bool(missed or (strict and differing))
    causes = pair.likely_causes(measured) if failed and pair is not None else []
    return Verdict(failed, missed, differing, causes)


def _fields(
    measured: Sequence[Fidelity], protocol: str, window: int, verdict: Verdict | None
) -> dict[str, Any]:
    gate = None
    if verdict is not None:
        misses = [*map(asdict, verdict.missed)]
        gate = {"passed": not verdict.failed, "misses": misses, "causes": verdict.causes}
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
        if text.kl_by_position is not None:
            first, last = text.kl_by_position.first_quarter, text.kl_by_position.last_quarter
            click.echo(f"  KL by position  {first:.6f} to {last:.6f}")


def _judge(verdict: Verdict) -> None:
    for miss in verdict.missed:
        note(f"missed: {miss.number} on {miss.text} is {miss.measured:.6g}, not {miss.threshold:g}")
    for cause in verdict.causes:
        note(f"likely cause: {cause}")
    if verdict.failed:
        raise GateMissedError(
            f"{len(verdict.missed)} of the gate's numbers missed, "
            f"{len(verdict.differing)} differences from the reference",
            hint="docs/troubleshooting.md goes from causes to cures",
        )
    for difference in verdict.differing:
        note(f"differs: {difference}")
