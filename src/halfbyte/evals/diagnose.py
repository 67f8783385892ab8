"""What is probably wrong with a model that parts from its reference: sentences, likeliest first.

Facts before inference. Descriptions that differ, text assets that differ and weights that rounding
does not explain name themselves; where all agree, the computation is left, and the positions at
which the KL divergence arises say where in it to look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.evals.differences import text_differences
from halfbyte.evals.fidelity import Fidelity
from halfbyte.evals.positions import Profile
from halfbyte.evals.weights import weight_faults
from halfbyte.formats.checkpoint import Source
from halfbyte.specs.differences import spec_differences

RISES = 2.0  # times: rounding alone is nearly the same at every position


def differences(model: Source, reference: Source) -> list[str]:
    """What the two say of themselves that should be the same; no weight is read."""
    found = spec_differences(model.spec, reference.spec)
    if model.assets is None or reference.assets is None:
        return found
    return [*found, *text_differences(model.assets, reference.assets)]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Likely causes, likeliest first, never empty; `at_fault`: something is wrong, and named."""

    causes: Sequence[str]
    at_fault: bool


def diagnose(model: Source, reference: Source, measured: Sequence[Fidelity]) -> Diagnosis:
    """Why a model missed its gate against a reference."""
    facts = [*differences(model, reference), *weight_faults(model, reference)]
    profiles = [text.kl_by_position for text in measured if text.kl_by_position is not None]
    hints = list(_hints(profiles[0])) if profiles else []
    return Diagnosis([*facts, *hints] if facts else [*hints, _remainder(model)], bool(facts))


def _hints(found: Profile) -> Iterator[str]:
    first, last = found.first_quarter, found.last_quarter
    within, beyond = found.within_window, found.beyond_window
    if within is not None and beyond is not None and beyond > RISES * within:
        yield (
            f"KL jumps beyond the sliding window (from {within:.3g} to {beyond:.3g}): "
            "a wrong window, or rope"
        )
    elif last > RISES * first:
        yield (
            f"KL rises with the position (from {first:.3g} to {last:.3g}): "
            "a wrong rope base, rope scaling or window"
        )


def _remainder(model: Source) -> str:
    quantized = {scheme.name for scheme in model.schemes.values() if not scheme.is_float}
    if quantized:
        names = ", ".join(sorted(quantized))
        return (
            f"descriptions, texts and weights agree up to rounding: it is the rounding of {names}"
        )
    return (
        "descriptions, texts and weights agree, so the computation differs; measure again with "
        "--dtype f32 --kv f32: if the numbers mend, it is at fault"
    )
