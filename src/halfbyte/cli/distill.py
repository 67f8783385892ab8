"""`halfbyte distill`: a model teaches its own four-bit form, and the result is proved."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from halfbyte.cli import flags
from halfbyte.cli.columns import columns
from halfbyte.cli.console import document, note, progress, typed
from halfbyte.cli.values import gib, length, size
from halfbyte.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from halfbyte.planner.ways import TrainingPlan
    from halfbyte.training.loop import Standing, Tell
    from halfbyte.workflows import Distilled

EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)
SILENCE_S = 10.0


def _from_file(ctx: click.Context, _parameter: click.Parameter, path: Path | None) -> None:
    """The flags of a TOML file become the defaults of this command; flags that are typed win."""
    if path is None:
        return
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"not a TOML file: {error}", where=path) from error
    known = {
        option.removeprefix("--"): str(parameter.name)
        for parameter in ctx.command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--")
    }
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidInputError(
            f"no flag is called {', '.join(unknown)}", where=path, hint="as --help names them"
        )
    ctx.default_map = {known[name]: value for name, value in given.items()}


@click.command("distill")
@flags.MODEL
@click.option(
    "--config",
    type=EXISTING,
    is_eager=True,
    expose_value=False,
    callback=_from_file,
    help="A TOML file of these flags by their names: steps = 1000, data = [...].",
)
@click.option(
    "-o",
    "target",
    required=True,
    type=click.Path(path_type=Path),
    help="X.gguf, or a directory. What is there stays, unless the result is better.",
)
@click.option(
    "--data",
    multiple=True,
    type=EXISTING,
    metavar="FILE",
    help="A text, or .jsonl conversations, to learn from; several are mixed.",
)
@click.option(
    "--own",
    "own_tokens",
    type=length,
    metavar="TOKENS",
    help="Learn from so much that MODEL says itself, too: 200k. Answers, where --data has prompts.",
)
@click.option(
    "--task-data",
    "task",
    multiple=True,
    type=EXISTING,
    metavar="FILE",
    help="Conversations whose answers are to be learned for themselves.",
)
@click.option(
    "--task-weight",
    "task_share",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="The share of these answers in their own loss; the rest is to stay as MODEL is.",
)
@click.option(
    "--held-out",
    multiple=True,
    type=EXISTING,
    metavar="FILE",
    help="What the result is measured on; data that holds some of it is refused. [default: short "
    "texts of our own]",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True),
    help="A quantized MODEL to begin with, of the same recipe. [default: one is made with GPTQ]",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "full", "lora", "scales", "blockwise"]),
    default="auto",
    show_default=True,
    help="What is trained (docs/qat.md); auto is the first of these that fits.",
)
@click.option("--recipe", default="q4_0", show_default=True, help="As of quantize.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Windows of a step."
)
@click.option(
    "--at-once",
    type=click.IntRange(min=1),
    help="Windows in memory at a time. [default: the batch]",
)
@click.option("--window", type=click.IntRange(min=16), default=256, show_default=True)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    help="Windows to learn from, at most. [default: as many as the steps need, once]",
)
@click.option(
    "--prompt-weight",
    type=click.FloatRange(0, 1),
    default=0.3,
    show_default=True,
    help="How much the tokens of prompts count; those of answers count 1.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="How far a weight goes in a step, in steps of its grid.",
)
@click.option(
    "--scale-rate",
    type=click.FloatRange(min=0),
    help="How far a scale or a norm goes in a step, in parts of itself.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Of the updates of --mode lora.",
)
@click.option("--small", is_flag=True, help="8-bit states of the optimizer, weights in bf16.")
@click.option(
    "--keep-layers",
    is_flag=True,
    help="Keep what layers compute for the way back: faster, and more memory.",
)
@click.option(
    "--measure-every",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Steps between two looks at what is held apart of the data.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--budget", type=size, help="The memory it may take: 12GiB.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:INDEX.")
@click.option("--threads", type=click.IntRange(min=1), help="Compute threads.")
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write the curves for TensorBoard, too.",
)
@click.option("--force", is_flag=True, help="Write over what is there, though it be better.")
@flags.JSON
def command(
    model: str,
    target: Path,
    data: tuple[Path, ...],
    own_tokens: int | None,
    task: tuple[Path, ...],
    task_share: float,
    held_out: tuple[Path, ...],
    start: Path | None,
    mode: Any,
    recipe: str,
    steps: int,
    batch: int,
    at_once: int | None,
    window: int,
    samples: int | None,
    prompt_weight: float,
    rate: float | None,
    scale_rate: float | None,
    rank: int,
    small: bool,
    keep_layers: bool,
    measure_every: int,
    seed: int,
    budget: int | None,
    device: str,
    threads: int | None,
    tensorboard: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Train a quantized form of MODEL to predict as MODEL does, on the grid that ships.

    The result is measured against MODEL on texts that took no part, and takes its place only where
    it is better than what it began with and what is there (else the exit code is 7). A run that was
    stopped goes on where it was when it is started again.
    """
    from halfbyte import workflows
    from halfbyte.training.modes import Rates
    from halfbyte.training.samples import Mix

    held = 16
    rates = Rates.given(places=rate, scales=scale_rate)
    asked = workflows.Distilling(
        data=data,
        held_out=held_out,
        task=task,
        task_share=task_share,
        own_tokens=own_tokens or 0,
        mix=Mix(
            count=samples or steps * batch + held,
            length=window,
            seed=seed,
            prompts=prompt_weight,
        ),
        held=held,
        mode=mode,
        steps=steps,
        batch=batch,
        at_once=min(at_once or batch, batch),
        rates=rates,
        rank=rank,
        small=small,
        again=not keep_layers,
        recipe=recipe,
        start=start,
        measure_every=measure_every,
        seed=seed,
        budget=budget,
        device=device,
        threads=threads,
        force=force,
        made_by=typed(),
    )
    with progress("preparing") as report:
        told = workflows.distill(model, target, asked, tell=_teller(tensorboard), progress=report)
    if as_json:
        document("distill", _fields(told))
    else:
        _show(told)


def _teller(folder: Path | None) -> Callable[[str, TrainingPlan], Tell]:
    write = _board(folder) if folder is not None else None

    def teller(name: str, plan: TrainingPlan) -> Tell:
        planned = sum(cost.bytes for cost in plan.costs if cost.place == "device")
        note(f"training {name}: {gib(planned)} planned with all around it")
        last = [0.0]

        def tell(standing: Standing) -> None:
            if write is not None:
                write(name, standing)
            if monotonic() - last[0] >= SILENCE_S or standing.step == standing.steps:
                last[0] = monotonic()
                note(f"{name} {_line(standing)}")

        return tell

    return teller


def _line(standing: Standing) -> str:
    from halfbyte.planner.probe import resident_bytes

    return (
        f"{standing.step}/{standing.steps}: loss {standing.loss:.5f}, held out "
        f"{standing.measure:.5f} (best {standing.best:.5f}), {standing.tokens_per_s:.0f} tokens/s, "
        f"{gib(resident_bytes())}, {_duration(standing.left_s)} left"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def _board(folder: Path) -> Callable[[str, Standing], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UnsupportedError(
            "needs the package tensorboard",
            where="--tensorboard",
            hint="pip install 'halfbyte[tensorboard]'",
        ) from error
    writer = SummaryWriter(str(folder))

    def write(name: str, standing: Standing) -> None:
        for what in ("loss", "measure", "tokens_per_s"):
            writer.add_scalar(f"{name}/{what}", getattr(standing, what), standing.step)

    return write


def _fields(told: Distilled) -> dict[str, Any]:
    return {
        "path": str(told.artefact.path),
        "manifest": str(told.artefact.manifest),
        "bytes": told.artefact.bytes,
        "source_bytes": told.artefact.source_bytes,
        "mode": told.mode,
        "outcomes": {name: asdict(outcome) for name, outcome in told.outcomes.items()},
        "marks": [asdict(mark) for mark in told.marks],
        "moved": [asdict(item) for item in told.moved],
        "before": [asdict(text) for text in told.before],
        "texts": [asdict(text) for text in told.after],
        "memory": {"planned_bytes": told.planned_bytes, "peak_bytes": told.peak_bytes},
        "notes": list(told.notes),
    }


def _show(told: Distilled) -> None:
    click.echo(told.artefact.path)
    for name, outcome in told.outcomes.items():
        ended = "" if outcome.ended == "done" else " (it diverged; the best is kept)"
        note(
            f"{name}: held out {outcome.before:.5f} -> {outcome.best:.5f} at step "
            f"{outcome.best_step} of {outcome.steps}, {_duration(outcome.seconds)}{ended}"
        )
    rows = [("", "KL before", "after", "ppl before", "after")]
    for before, after in zip(told.before, told.after, strict=True):
        assert before.kl is not None and after.kl is not None
        ratios = [text.perplexity_ratio or 1.0 for text in (before, after)]
        lost = [f"{100 * (ratio - 1):+.2f} %" for ratio in ratios]
        told_of = [f"{text.mean:.5f}" for text in (before.kl, after.kl)]
        rows.append((before.name, told_of[0], told_of[1], lost[0], lost[1]))
    for line in columns(rows, right=(1, 2, 3, 4)):
        note(line)
    flipped = [item.flipped for item in told.moved if item.flipped is not None]
    if flipped:
        note(f"{100 * sum(flipped) / len(flipped):.1f} % of the integers moved, by the tensor")
    note(f"memory: {gib(told.peak_bytes)} of {gib(told.planned_bytes)} planned")
    for said in told.notes:
        note(said)
    note(f"next: halfbyte run {told.artefact.path}")
