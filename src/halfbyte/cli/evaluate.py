"""`halfbyte eval`: a model on texts and tasks, alone or beside a reference, through a gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, judge, note, progress, typed
from halfbyte.cli.values import length, named_files
from halfbyte.errors import GateMissedError, InvalidInputError

if TYPE_CHECKING:
    from halfbyte.evals.fidelity import Fidelity
    from halfbyte.evals.gate import Gate
    from halfbyte.evals.tasks.outcome import TaskResult
    from halfbyte.evals.tasks.settings import Settings
    from halfbyte.specs import LoadOptions
    from halfbyte.workflows import Asked, Evaluation, Measured, Verdict

DEFAULT = "default"


@click.command("eval")
@flags.MODEL
@click.option("--against", help="The reference: usually the model before it was quantized.")
@click.option(
    "--against-lora",
    "merged",
    multiple=True,
    metavar="PATH[@SCALE]",
    help="A LoRA adapter that is merged into the reference, as distill --merge-lora did.",
)
@click.option("--lora", metavar="PATH[@SCALE]", help="Measure MODEL with this LoRA adapter.")
@flags.READING
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="KIND[=FILE]",
    help="choices, gsm8k, humaneval, needle, answers or tools, on items of FILE; may be repeated.",
)
@click.option("--limit", type=click.IntRange(min=1), help="The first so many items of a task.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=256, help="Of a task's answer.")
@click.option("--longest", type=length, default="4k", help="Tokens of the needle's haystack.")
@click.option("--allow-code", is_flag=True, help="Run the programs that a model writes.")
@click.option(
    "--gate",
    "gate_name",
    metavar="FILE|default",
    help="A TOML file of thresholds, or ours for how MODEL is stored; a miss exits 7.",
)
@click.option(
    "--report",
    "report_to",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write report.html, report.json and a model card there.",
)
@click.option(
    "--speculation",
    type=length,
    metavar="TOKENS",
    help="Instead, compare so many tokens drafted in every way with plain decoding.",
)
@flags.DRAFTER
@click.option("--recipe", help="Quantize an unquantized model while loading it.")
@flags.METHOD
@click.option("--kv", type=click.Choice(["bf16", "q8_0", "f32"]), default="bf16", show_default=True)
@flags.DEVICE
@flags.JSON
def command(
    model: str,
    against: str | None,
    merged: tuple[str, ...],
    lora: str | None,
    texts: tuple[str, ...],
    protocol: Any,
    window: int,
    max_windows: int | None,
    tasks: tuple[str, ...],
    limit: int | None,
    max_tokens: int,
    longest: int,
    allow_code: bool,
    gate_name: str | None,
    report_to: Path | None,
    speculation: int | None,
    drafter: str,
    recipe: str | None,
    method: Any,
    kv: Any,
    device: str,
    dtype: Any,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure MODEL on texts and tasks, alone or --against a reference.

    With a gate the result is kept in the manifest of MODEL, if it has one.
    """
    from halfbyte import workflows
    from halfbyte.evals.tasks.settings import Settings
    from halfbyte.evals.texts import Reading
    from halfbyte.specs import LoadOptions

    settings = Settings(limit=limit, max_tokens=max_tokens, longest=longest, allow_code=allow_code)
    asked = _asked(tasks, settings)
    options = LoadOptions(
        recipe=recipe,
        method=method,
        device=device,
        dtype=dtype,
        kv=kv,
        threads=threads,
        drafter=drafter,
    )
    if speculation is not None:
        _prove(model, speculation, options, as_json=as_json)
        return
    if merged and against is None:
        raise InvalidInputError("there is no reference", where="--against-lora", hint="--against")
    evaluation = workflows.Evaluation(
        model, against=against, options=options, lora=lora, merged=merged
    )
    gate = _gate(gate_name, evaluation)
    reading = Reading(protocol=protocol, window=window, max_windows=max_windows)
    named = named_files(texts) or ({} if tasks else evaluation.own_texts)
    with progress("measuring") as report:
        measured = evaluation.measure(named, reading, asked, report)
    verdict = None
    if gate is not None and gate_name is not None:
        verdict = evaluation.judge(gate, measured, strict=gate_name == DEFAULT)
        evaluation.keep(measured, Path(gate_name).name, verdict)
    if report_to is not None:
        page = workflows.report(
            evaluation, measured, verdict, texts=named, directory=report_to, measured_by=typed()
        )
        note(f"report: {page}")
    if as_json:
        document("eval", _fields(measured, verdict))
    else:
        _table(measured)
    if verdict is not None:
        judge(verdict)
    for difference in evaluation.differences():
        note(f"differs: {difference}")


def _prove(model: str, tokens: int, options: LoadOptions, *, as_json: bool) -> None:
    """The self-test of speculation; a token that differs is a missed gate."""
    from halfbyte import workflows

    with progress("comparing") as report:
        proof = workflows.prove_speculation(model, tokens=tokens, options=options, progress=report)
    if as_json:
        facts = {"ops": proof.ops, "tokens": proof.tokens, "differing": proof.differing}
        document("eval", {"speculation": {**facts, "trials": [*map(asdict, proof.trials)]}})
    else:
        for trial in proof.trials:
            rate = "" if trial.tokens_per_round is None else f"{trial.tokens_per_round:.2f} a round"
            click.echo(
                f"  {trial.drafter:16} {trial.sampling:10} {trial.tokens:7} tokens, "
                f"{trial.differing} differ  {rate}"
            )
        click.echo(f"{proof.tokens} tokens compared in {proof.ops} ops, {proof.differing} differ")
    if proof.differing:
        raise GateMissedError(
            f"{proof.differing} of {proof.tokens} tokens changed when they were drafted",
            hint="this should never be: report it with this output; --draft off runs without",
        )


def _asked(tasks: Sequence[str], settings: Settings) -> list[Asked]:
    """The tasks, each named after its file, or its kind where it has none."""
    from halfbyte.evals.tasks import read_task
    from halfbyte.workflows import Asked

    found: dict[str, Asked] = {}
    for task in tasks:
        kind, _, file = task.partition("=")
        path = Path(file) if file else None
        name = kind if path is None else path.name.partition(".")[0]
        if name in found:
            raise InvalidInputError(f"two tasks are named '{name}'", where="--task")
        found[name] = Asked(name=name, kind=kind, task=read_task(kind, path, settings))
    return [*found.values()]


def _gate(name: str | None, evaluation: Evaluation) -> Gate | None:
    from halfbyte.evals.gate import read_gate

    if name is None:
        return None
    if name != DEFAULT:
        return read_gate(Path(name))
    if evaluation.base is None:
        raise InvalidInputError("the default gate needs a reference", hint="use --against")
    return evaluation.default_gate()


def _fields(measured: Measured, verdict: Verdict | None) -> dict[str, Any]:
    return {
        **asdict(measured.reading),
        "ops": measured.ops,
        "texts": [*map(asdict, measured.texts)],
        "tasks": [*map(asdict, measured.tasks)],
        "gate": None
        if verdict is None
        else {**asdict(verdict), "misses": [*map(asdict, verdict.misses)]},
    }


def _table(measured: Measured) -> None:
    for text in measured.texts:
        click.echo(f"{text.name}: {text.tokens} tokens scored")
        for label, value in _of_text(text):
            click.echo(f"  {label:16} {value}")
    for task in measured.tasks:
        click.echo(f"{task.name}: {task.kind}, {task.items} items")
        for label, value in _of_task(task):
            click.echo(f"  {label:16} {value}")


def _of_text(text: Fidelity) -> Iterator[tuple[str, str]]:
    yield "perplexity", f"{text.perplexity:.4f} +- {text.perplexity_error:.4f}"
    kl, change = text.kl, text.right_token
    if kl is None or change is None:
        return
    rise = (text.perplexity_ratio or 0.0) - 1
    error = text.perplexity_ratio_error
    yield "of reference", f"{text.reference_perplexity:.4f} ({rise:+.2%} +- {error:.2%})"
    yield "KL mean", f"{kl.mean:.6f} +- {kl.mean_error:.6f}"
    yield "KL median, p99", f"{kl.median:.6f}, {kl.p99:.6f}"
    yield "KL p99.9, max", f"{kl.p999:.6f}, {kl.max:.6f}"
    yield "same top-1", f"{text.same_top1:.2%}"
    yield "right token", f"{change.mean:+.3%} on average, RMS {change.rms:.3%}"
    if text.kl_by_position is not None:
        first, last = text.kl_by_position.first_quarter, text.kl_by_position.last_quarter
        yield "KL by position", f"{first:.6f} to {last:.6f}"


def _of_task(task: TaskResult) -> Iterator[tuple[str, str]]:
    before = f", reference {task.reference_score:.2%}" if task.reference_score is not None else ""
    yield "score", f"{task.score:.2%}{before}"
    if task.flips is not None:
        both = f"{task.flips.to_wrong} to wrong, {task.flips.to_right} to right"
        yield "flips", f"{task.flips.rate:.2%}: {both} (p = {task.flips.p_value:.2g})"
    theirs = task.reference_numbers or {}
    for name, value in task.numbers.items():
        yield name, f"{value:.4g}" + (f", reference {theirs[name]:.4g}" if name in theirs else "")
