"""A model for the planner: its spec and how it is stored, from headers alone."""

from __future__ import annotations

from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import locate
from halfbyte.planner.solve import Model

PLAIN = {"f32", "f16", "bf16"}


def model_of(reference: str) -> Model:
    """The model that a reference names. What is stored in blocks is run as it is stored."""
    source = read(locate(reference))
    quantized = any(scheme.name not in PLAIN for scheme in source.schemes.values())
    return Model(
        name=reference,
        spec=source.spec,
        schemes=source.schemes,
        quantized=quantized,
        tokenizer=source.assets is not None,
    )
