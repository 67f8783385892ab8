"""A model for the planner: its spec and how it is stored, from headers alone."""

from __future__ import annotations

from dataclasses import replace

from halfbyte.errors import DoesNotFitError
from halfbyte.formats.checkpoint import Source, read
from halfbyte.formats.reference import locate
from halfbyte.planner.solve import USUAL_CONTEXT, Goal, Model, solve
from halfbyte.specs import Machine, Plan

PLAIN = {"f32", "f16", "bf16"}


def model_of(reference: str) -> Model:
    """The model that a reference names. What is stored in blocks is run as it is stored."""
    return described(reference, read(locate(reference)))


def described(name: str, source: Source) -> Model:
    """A source as the planner sees it."""
    quantized = any(scheme.name not in PLAIN for scheme in source.schemes.values())
    return Model(
        name=name,
        spec=source.spec,
        schemes=source.schemes,
        quantized=quantized,
        tokenizer=source.assets is not None,
    )


def plan_of_source(name: str, source: Source, machine: Machine, goal: Goal) -> Plan:
    """How an opened source is run on a machine: as it is stored, with the context that is asked
    for, or the usual one, or where memory is short the longest that fits.

    Raises `DoesNotFitError` for a context that was asked for.
    """
    model = replace(described(name, source), quantized=True)
    usual = replace(goal, context=goal.context or min(model.spec.context, USUAL_CONTEXT))
    try:
        return solve(model, machine, usual)[0]
    except DoesNotFitError:
        if goal.context is not None:
            raise
        return solve(model, machine, goal)[0]
