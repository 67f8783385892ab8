"""A model for the planner: its spec and how it is stored, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from halfbyte.errors import DoesNotFitError, HalfbyteError
from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.documents import read_json
from halfbyte.formats.reference import locate_outline
from halfbyte.planner.solve import USUAL_CONTEXT, Goal, Model, solve
from halfbyte.specs import SCHEMES, Machine, Plan

CONFIG = "config.json"
PLAIN = {"f32", "f16", "bf16"}


def model_of(reference: str) -> Model:
    """The model that a reference names. What is stored in blocks is run as it is stored.

    A config.json alone, or in a folder without weights, is enough.
    """
    path = Path(reference).expanduser()
    config = path / CONFIG if path.is_dir() else path
    if config.name == CONFIG and config.is_file() and not any(config.parent.glob("*.safetensors")):
        return _of_config(reference, config)
    checkpoint = read(locate_outline(reference))
    return described(reference, checkpoint, tokenizer=checkpoint.has_text)


def _of_config(name: str, config: Path) -> Model:
    """Weights that are not there are taken to be in bf16."""
    try:
        spec = spec_of(read_json(config))
    except HalfbyteError as error:
        raise type(error)(error.what, where=error.where or config, hint=error.hint) from error
    schemes = {tensor.name: SCHEMES["bf16"] for tensor in spec.tensors()}
    return Model(name=name, spec=spec, schemes=schemes, quantized=False)


def described(name: str, source: Source, *, tokenizer: bool) -> Model:
    """A source as the planner sees it."""
    quantized = any(scheme.name not in PLAIN for scheme in source.schemes.values())
    return Model(
        name=name,
        spec=source.spec,
        schemes=source.schemes,
        quantized=quantized,
        tokenizer=tokenizer,
    )


def plan_of_source(name: str, source: Source, machine: Machine, goal: Goal) -> Plan:
    """How an opened source is run on a machine: as it is stored, with the context that is asked
    for, or the usual one, or where memory is short the longest that fits.

    Raises `DoesNotFitError` for a context that was asked for.
    """
    model = replace(described(name, source, tokenizer=source.assets is not None), quantized=True)
    usual = replace(goal, context=goal.context or min(model.spec.context, USUAL_CONTEXT))
    try:
        return solve(model, machine, usual)[0]
    except DoesNotFitError:
        if goal.context is not None:
            raise
        return solve(model, machine, goal)[0]
