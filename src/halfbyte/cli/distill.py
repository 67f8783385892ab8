"""`halfbyte distill`: a model teaches its own four-bit form, and the result is proved."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from halfbyte.cli import flags
from halfbyte.cli.console import document, progress, typed
from halfbyte.cli.distill_told import fields, show, teller
from halfbyte.cli.values import length, size
from halfbyte.errors import InvalidInputError

EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


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
    "--max-windows",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Measured of each held-out text, of 512 tokens.",
)
@click.option(
    "--merge-lora",
    "merged",
    multiple=True,
    metavar="PATH[@SCALE]",
    help="A LoRA adapter to merge into MODEL before all else: the sum is the original.",
)
@click.option(
    "--start",
    type=click.Path(path_type=Path, exists=True),
    help="A quantized MODEL to begin with, of the same recipe. [default: one is made with YAQA]",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "full", "lora", "scales", "blockwise", "adapter"]),
    default="auto",
    show_default=True,
    help="What is trained (docs/qat.md); auto is the first of these that fits. adapter: nothing of "
    "--start (or of MODEL, if quantized) but a LoRA adapter beside it; -o is its directory.",
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
    help="How far a weight goes in a step, in steps of its grid; a number of an adapter, as it is.",
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
    help="Of the updates of --mode lora and adapter.",
)
@click.option(
    "--alpha",
    type=click.FloatRange(min=0, min_open=True),
    help="Of an adapter. [default: its rank]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="What an adapter changes: q_proj, down_proj, ... [default: every linear]",
)
@click.option(
    "--curvature",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Windows by which it learns what errors of weights cost, if it moves integers. 0: none.",
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
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds of training that a kill costs at most, about.",
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
    max_windows: int,
    merged: tuple[str, ...],
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
    alpha: float | None,
    targets: tuple[str, ...],
    curvature: int,
    small: bool,
    keep_layers: bool,
    measure_every: int,
    save_every: float,
    seed: int,
    budget: int | None,
    device: str,
    threads: int | None,
    tensorboard: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Train a quantized form of MODEL to predict as MODEL does, on the grid that ships; or, with
    --mode adapter, a LoRA adapter beside it.

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
        merged=merged,
        held_out=held_out,
        max_windows=max_windows,
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
        alpha=alpha,
        targets=targets,
        curvature=curvature,
        small=small,
        again=not keep_layers,
        recipe=recipe,
        start=start,
        measure_every=measure_every,
        save_every_s=save_every,
        seed=seed,
        budget=budget,
        device=device,
        threads=threads,
        force=force,
        made_by=typed(),
    )
    with progress("preparing") as report:
        told = workflows.distill(model, target, asked, tell=teller(tensorboard), progress=report)
    if as_json:
        document("distill", fields(told))
    else:
        show(told)
