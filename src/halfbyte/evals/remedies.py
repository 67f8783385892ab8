"""What would help a model that missed its gate although nothing is wrong with it: sentences, the
cheapest first.

They follow from how it was made (recipe, method), how it is stored and how it ran. What is wrong
with a model, if something is, diagnose.py names; that comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from halfbyte.evals.gate import Check
from halfbyte.specs import KVType, ModelSpec, Scheme

FAITHFUL = 6.0  # bits: more in an embedding or a head helps little


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """How a model came about, and ran: `method` is None where nobody tells."""

    spec: ModelSpec
    schemes: Mapping[str, Scheme]
    kv: KVType
    rounds_activations: bool
    method: str | None = None


def remedies(made: Making, missed: Sequence[Check]) -> list[str]:
    """What to try, in this order; empty where nothing is stored in blocks."""
    coarse = {scheme for name, scheme in made.schemes.items() if _is_coarse(name, scheme)}
    return [*_of_the_run(made), *_of_the_file(made, coarse, missed)] if missed else []


def _is_coarse(name: str, scheme: Scheme) -> bool:
    return name.startswith("layers.") and scheme.block > 1 and scheme.bits < FAITHFUL


def _of_the_run(made: Making) -> Iterator[str]:
    if made.kv == "q8_0":
        yield "--kv bf16: keys and values ran in q8_0"


def _of_the_file(made: Making, coarse: set[Scheme], missed: Sequence[Check]) -> Iterator[str]:
    if coarse and made.method == "rtn":
        yield "--method search: the scale of least error, in no more bytes"
    if coarse and made.method in ("rtn", "search", None):
        yield "--method gptq --calib FILE: rounding that knows the activations, in no more bytes"
    elif coarse:
        if made.method in ("gptq", "awq", "signround"):
            yield "--method yaqa: rounding for what the whole model says, in no more bytes"
        names = ", ".join(dict.fromkeys(miss.text for miss in missed))
        yield f"more calibration text, and some like {names} (but never the text measured on)"
    head = made.schemes[made.spec.head_name]
    if head.block > 1 and head.bits < FAITHFUL:
        yield f"--recipe q4_0: embedding and head in q6_k, which are {head.name} here"
    if any(scheme.block > 32 for scheme in coarse):
        yield "smaller groups: int4-g32 or q4_0"
    if coarse:
        yield "--size BYTES: more bits for the tensors that need them; or --recipe q8_0"
    if made.rounds_activations:
        yield "--dtype f32 tells how much of it is the rounding of activations in this run"
