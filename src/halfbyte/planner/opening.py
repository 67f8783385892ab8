"""A model for the planner: its spec and how it is stored, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import DoesNotFitError, HalfbyteError, InvalidInputError
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import Checkpoint, Pieces, Source, read
from halfbyte.formats.documents import read_json
from halfbyte.formats.reference import drafter_beside, locate_outline
from halfbyte.planner.calibration import EMPTY, Store
from halfbyte.planner.runtimes import Companion
from halfbyte.planner.solve import MOST, USUAL_CONTEXT, Goal, Model, solve
from halfbyte.specs import (
    AUTO,
    SCHEMES,
    LoadOptions,
    Machine,
    ModelSpec,
    Plan,
    paired_layers,
)

if TYPE_CHECKING:
    from halfbyte.formats.lora import Adapter
    from halfbyte.text.assets import TextAssets

CONFIG = "config.json"
STORED = ("weights.", "drafter.weights.")
PLAIN = {"f32", "f16", "bf16"}


def model_of(reference: str, *, drafter: str | None = AUTO, adapters: Sequence[str] = ()) -> Model:
    """The model that a reference names. What is stored in blocks is run as it is stored.

    A config.json alone, or in a folder without weights, is enough. `drafter` is a path, "auto" for
    the one beside the model if any, None for none; `adapters` are `PATH[@SCALE]` of PEFT folders.
    Raises `InvalidInputError` for what belongs to another model.
    """
    model = _alone(reference)
    return replace(
        model,
        drafter=None if drafter is None else _companion(drafter, reference, model.spec),
        adapters=_adapters(adapters, model.spec),
    )


def _companion(drafter: str, reference: str, target: ModelSpec) -> Companion | None:
    """The drafter of a target; the one beside it, if that is another's, is left aside."""
    beside = None if drafter != AUTO else drafter_beside(Path(reference).expanduser())
    if drafter == AUTO and beside is None:
        return None
    name = drafter if beside is None else str(beside)
    source = read(locate_outline(name))
    try:
        paired_layers(source.spec, target)
    except InvalidInputError:
        if beside is None:
            raise
        return None
    return companion_of(name, source)


def _adapters(references: Sequence[str], spec: ModelSpec) -> dict[str, Adapter]:
    if not references:
        return {}
    from halfbyte.formats.lora import open_adapter  # only for those who have one

    return {reference: open_adapter(reference, spec) for reference in references}


def _alone(reference: str) -> Model:
    path = Path(reference).expanduser()
    config = path / CONFIG if path.is_dir() else path
    if config.name == CONFIG and config.is_file() and not any(config.parent.glob("*.safetensors")):
        return _of_config(reference, config)
    checkpoint = read(locate_outline(reference))
    return described(reference, checkpoint, checkpoint.pieces)


def _of_config(name: str, config: Path) -> Model:
    """Weights that are not there are taken to be in bf16."""
    try:
        spec = spec_of(read_json(config))
    except HalfbyteError as error:
        raise type(error)(error.what, where=error.where or config, hint=error.hint) from error
    schemes = {tensor.name: SCHEMES["bf16"] for tensor in spec.tensors()}
    return Model(name=name, spec=spec, schemes=schemes, quantized=False, pieces=Pieces(spec.vocab))


def described(name: str, source: Source, pieces: Pieces | None) -> Model:
    """A source as the planner sees it, without a drafter or adapters."""
    quantized = any(scheme.name not in PLAIN for scheme in source.schemes.values())
    return Model(
        name=name,
        spec=source.spec,
        schemes=source.schemes,
        quantized=quantized,
        pieces=pieces,
        left_out=source.left_out if isinstance(source, Checkpoint) else {},
    )


def opened(
    name: str, source: Source, drafter: Companion | None, adapters: Mapping[str, Adapter]
) -> Model:
    """An opened source as the planner sees it: it is run as it is stored."""
    model = described(name, source, _pieces(source.assets))
    return replace(model, quantized=True, drafter=drafter, adapters=adapters)


def _pieces(assets: TextAssets | None) -> Pieces | None:
    if assets is None:
        return None
    words = assets.vocabulary
    return Pieces(len(words.tokens), None if words.scores else len(words.merges), parsed=True)


def usual_plan(model: Model, machine: Machine, goal: Goal, store: Store = EMPTY) -> Plan:
    """How a model is run on a machine: with the context that is asked for, or the usual one, or
    where memory is short the longest that fits. Only where none fits on a card, or the one asked
    for does not, the model is divided.

    Raises `DoesNotFitError` for a context that was asked for.
    """
    usual = replace(
        goal,
        context=goal.context or min(model.spec.context, USUAL_CONTEXT),
        divides=goal.context is not None,
    )
    try:
        return solve(model, machine, usual, store)[0]
    except DoesNotFitError:
        if goal.context is not None:
            raise
        return solve(model, machine, goal, store)[0]


def companion_of(name: str, source: Source) -> Companion:
    """An opened drafter as the planner sees it."""
    return Companion(name=name, spec=source.spec, schemes=source.schemes)


def options_of(plan: Plan, options: LoadOptions) -> LoadOptions:
    """How a plan wants its model loaded; device, threads and rounding are the options' own."""
    setup = plan.setup
    drafted = setup.draft if setup.draft != MOST else AUTO
    return replace(
        options,
        recipe=setup.recipe,
        kv=setup.kv,
        context=setup.context,
        parallel=setup.sequences,
        spare=setup.spare,
        card_layers=setup.card_layers,
        draft=drafted if setup.draft else "off",
        drafter=setup.drafter or AUTO,
    )


def refuse_another(plan: Plan, found: Plan) -> None:
    """`InvalidInputError` where a plan says that something else is stored than was found."""
    for part in STORED if found.setup.drafter is not None else STORED[:1]:
        told, true = (
            {
                (row.component, row.place): row.bytes
                for row in one.rows
                if row.component.startswith(part)
            }
            for one in (plan, found)
        )
        for key in sorted(told.keys() | true.keys()):
            if not key[0].endswith(".layout") and told.get(key) != true.get(key):
                raise InvalidInputError(
                    f"the plan has {told.get(key, 0)} bytes of {key[0]}, "
                    f"the model {true.get(key, 0)}",
                    where=plan.model,
                    hint="it was made for another model or recipe: plan this one anew",
                )
