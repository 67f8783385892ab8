"""`halfbyte eval`: perplexity of a model on texts, and KL and top-1 against a reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, note, progress
from halfbyte.cli.values import named_files
from halfbyte.errors import GateMissedError, InvalidInputError

if TYPE_CHECKING:
    from halfbyte.evals.fidelity import Fidelity
    from halfbyte.evals.gate import Miss
    from halfbyte.evals.texts import Reading
    from halfbyte.workflows import Trial

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
    metavar="[NAME=]FILE",
    help="A UTF-8 text, or a .jsonl of conversations whose answers are scored; may be repeated. "
    "By default our own short ones.",
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
    texts: tuple[str, ...],
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
    from halfbyte.evals.texts import Reading
    from halfbyte.specs import LoadOptions

    options = LoadOptions(
        recipe=recipe, method=method, device=device, dtype=dtype, kv=kv, threads=threads
    )
    trial = workflows.Trial(model, against=against, options=options, lora=lora)
    gate = _gate(gate_name, trial)
    reading = Reading(protocol=protocol, window=window, max_windows=max_windows)
    with progress("measuring") as report:
        measured = trial.measure(named_files(texts) or trial.own_texts, reading, report)
    verdict = _verdict(gate, measured, trial, strict=gate_name == DEFAULT)
    if as_json:
        document("eval", _fields(measured, reading, None if gate is None else verdict))
    else:
        _table(measured)
    _judge(verdict)


def _gate(name: str | None, trial: Trial) -> dict[str, float] | None:
    from halfbyte.evals.gate import read_gate

    if name is None:
        return None
    if name != DEFAULT:
        return read_gate(Path(name))
    if trial.base is None:
        raise InvalidInputError("the default gate needs a reference", hint="use --against")
    return trial.gate()


def _verdict(
    gate: Mapping[str, float] | None,
    measured: Sequence[Fidelity],
    trial: Trial,
    *,
    strict: bool,
) -> Verdict:
    """`strict`: a model that describes itself otherwise than its reference misses, too."""
    from halfbyte.evals.gate import misses

    missed = [] if gate is None else misses(gate, measured)
    differing = trial.differences()
    failed = bool(missed or (strict and differing))
    causes = trial.likely_causes(measured) if failed else []
    return Verdict(failed, missed, differing, causes)


def _fields(
    measured: Sequence[Fidelity], reading: Reading, verdict: Verdict | None
) -> dict[str, Any]:
    gate = None
    if verdict is not None:
        misses = [*map(asdict, verdict.missed)]
        gate = {"passed": not verdict.failed, "misses": misses, "causes": verdict.causes}
    texts = [asdict(text) for text in measured]
    return {**asdict(reading), "texts": texts, "gate": gate}


def _table(measured: Sequence[Fidelity]) -> None:
    for text in measured:
        click.echo(f"{text.name}: {text.tokens} tokens scored")
        for label, value in _rows(text):
            click.echo(f"  {label:16} {value}")


def _rows(text: Fidelity) -> Iterator[tuple[str, str]]:
    yield "perplexity", f"{text.perplexity:.4f} +- {text.perplexity_error:.4f}"
    kl, change = text.kl, text.right_token
    if kl is None or change is None:
        return
    rise = (text.perplexity_ratio or 0.0) - 1
    yield (
        "of reference",
        f"{text.reference_perplexity:.4f} ({rise:+.2%} +- {text.perplexity_ratio_error:.2%})",
    )
    yield "KL mean", f"{kl.mean:.6f} +- {kl.mean_error:.6f}"
    yield "KL median, p99", f"{kl.median:.6f}, {kl.p99:.6f}"
    yield "KL p99.9, max", f"{kl.p999:.6f}, {kl.max:.6f}"
    yield "same top-1", f"{text.same_top1:.2%}"
    yield "right token", f"{change.mean:+.3%} on average, RMS {change.rms:.3%}"
    if text.kl_by_position is not None:
        first, last = text.kl_by_position.first_quarter, text.kl_by_position.last_quarter
        yield "KL by position", f"{first:.6f} to {last:.6f}"


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
