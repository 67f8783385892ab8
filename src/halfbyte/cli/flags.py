"""Flags that several verbs share, each defined once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from halfbyte.cli.console import note
from halfbyte.cli.values import draft, length
from halfbyte.errors import InvalidInputError

if TYPE_CHECKING:
    from halfbyte.planner.calibration import Store
    from halfbyte.specs import Plan

Function = TypeVar("Function", bound=Callable[..., Any])


def _all(*options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


MODEL = click.argument("model")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
LORA = click.option(
    "--lora",
    "loras",
    multiple=True,
    metavar="[NAME=]PATH[@SCALE]",
    help="A LoRA adapter (a PEFT directory); may be repeated, the first answers.",
)
HUB = click.option(
    "--from",
    "hub",
    type=click.Choice(["huggingface", "modelscope"]),
    default="huggingface",
    show_default=True,
    help="Which hub a name is on.",
)
METHOD = click.option(
    "--method",
    type=click.Choice(["rtn", "search"]),
    default="search",
    show_default=True,
    help="rtn: the format's reference rule. search: the scale of least error.",
)

DEVICE = _all(
    click.option(
        "--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:INDEX."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "f32", "bf16"]),
        default="auto",
        show_default=True,
        help="f32 rounds no activations.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Compute threads."),
)

CARD_LAYERS = click.option(
    "--card-layers",
    type=click.IntRange(min=1),
    help="The last so many layers on the card, the others on the CPU.  [default: all, or as many "
    "as fit]",
)

CACHE = _all(
    click.option("--context", type=length, help="Positions of one sequence, e.g. 8k."),
    click.option(
        "--kv",
        type=click.Choice(["bf16", "q8_0", "f32"]),
        default="bf16",
        show_default=True,
        help="How keys and values are kept.",
    ),
)

DRAFTER = click.option(
    "--drafter",
    default="auto",
    show_default=True,
    metavar="PATH|auto",
    help="A model that drafts; auto takes the one beside MODEL.",
)
DRAFT = _all(
    click.option(
        "--draft",
        type=draft,
        default="auto",
        show_default=True,
        help="Tokens drafted in a round: a number, off, or auto for as many as pay. The output is "
        "the same with any.",
    ),
    DRAFTER,
)

TEMPLATE = click.option(
    "--template",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A chat template (jinja) in place of the model's own.",
)
PLAN = click.option(
    "--plan",
    "plan_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What `halfbyte plan --emit` wrote, as it is or edited.",
)
CALIBRATION = click.option(
    "--calibration/--no-calibration",
    default=True,
    help="Use what `fill` measured on this machine, or only what is the same everywhere.",
)
# What a plan says, so that nothing else may.
OF_PLANS = (
    "context", "kv", "recipe", "sequences", "parallel", "draft", "drafter", "loras", "card_layers",
)  # fmt: skip


def planned(ctx: click.Context, file: Path) -> Plan:
    """The plan in a file. A flag beside it that says what the plan says is a usage error."""
    from halfbyte.specs import plan_of

    for name in OF_PLANS:
        if name in ctx.params and was_given(ctx, name):
            flag = "--lora" if name == "loras" else "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is said by the plan: change it in {file.name}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInputError(f"not a plan: {error}", where=file) from error
    if not isinstance(document, dict):
        raise InvalidInputError("not a plan: no JSON object", where=file)
    try:
        return plan_of(document)
    except InvalidInputError as error:
        raise InvalidInputError(error.what, where=file, hint=error.hint) from error


def measured(calibration: bool) -> Store:
    """What was measured on this machine; what cannot be used is told."""
    from halfbyte.planner.calibration import EMPTY, read_store

    store = read_store() if calibration else EMPTY
    if store.complaint is not None:
        note(store.complaint)
    return store


def template_of(file: Path | None) -> str | None:
    """The text of --template."""
    return None if file is None else file.read_text(encoding="utf-8", errors="replace")


def was_given(ctx: click.Context, name: str) -> bool:
    """Whether a person typed this flag."""
    return ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def references(loras: tuple[str, ...]) -> list[str]:
    """Where the adapters of every --lora are, without the names they are given."""
    from halfbyte.cli.adapters import named

    return [*named(loras).values()]


READING = _all(
    click.option(
        "--text",
        "texts",
        multiple=True,
        metavar="[NAME=]FILE",
        help="A UTF-8 text, or a .jsonl of conversations whose answers count; may be repeated. "
        "Without any, short ones of our own.",
    ),
    click.option(
        "--protocol",
        type=click.Choice(["llama.cpp", "full"]),
        default="llama.cpp",
        show_default=True,
        help="llama.cpp: the second half of each window is scored. full: every token.",
    ),
    click.option("--window", type=click.IntRange(min=4), default=512, show_default=True),
    click.option("--max-windows", type=click.IntRange(min=1), help="Stop after so many windows."),
)

SAMPLING = _all(
    click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after so many tokens."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens of this total."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1 repeats less."),
    click.option("--seed", type=int, help="The same seed gives the same tokens."),
)

# Of `plan`, beside --train.
OF_TRAINING = (
    "batch", "seq", "precision", "optimizer", "checkpointing", "loss_rows", "rank", "targets",
    "tokens", "gpus", "zero", "offload",
)  # fmt: skip
TRAINING = _all(
    click.option(
        "--train",
        type=click.Choice(
            ["full", "lora", "qlora", "qat", "qat-lora", "scales", "blockwise", "adapter"]
        ),
        help="Plan a training: of all weights, of low-rank updates of plain or packed weights; or, "
        "as distill does, on the 4-bit grid: of all weights, of low-rank updates inside the "
        "rounding, of the scales alone, of one layer after another; of an adapter beside it.",
    ),
    click.option("--batch", type=click.IntRange(min=1), default=1, help="Sequences on a GPU."),
    click.option("--seq", type=length, default="2k", help="Tokens of a sequence."),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "mixed", "bf16"]),
        default="mixed",
        help="mixed: bf16 with fp32 master copies. bf16: without.",
    ),
    click.option("--optimizer", type=click.Choice(["adamw", "adamw-8bit", "sgd"]), default="adamw"),
    click.option(
        "--checkpointing/--no-checkpointing", default=True, help="Compute layers again, or keep."
    ),
    click.option("--loss-rows", type=click.IntRange(min=1), help="Logits of so many at a time."),
    click.option("--rank", type=click.IntRange(min=1), default=16, help="Of low-rank updates."),
    click.option(
        "--target",
        "targets",
        multiple=True,
        metavar="NAME",
        help="What an adapter changes: q_proj, down_proj, ... [default: every linear]",
    ),
    click.option("--tokens", type=length, default=None, help="Whose states lie ready: 1m."),
    click.option("--gpus", type=click.IntRange(min=1), default=1),
    click.option("--zero", type=click.IntRange(0, 3), default=0, help="ZeRO's stage."),
    click.option("--offload", type=click.Choice(["none", "cpu", "nvme"]), default="none"),
)
