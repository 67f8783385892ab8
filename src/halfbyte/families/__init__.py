"""One file per family: config -> spec, and one name table ours <-> Hugging Face <-> GGUF.

`spec_of` turns what a checkpoint says about itself into a `ModelSpec`, without torch and without
reading weights. To add a family, write its file and add it to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.families import gemma3, gemma4, gemma4_assistant, llama
from halfbyte.families.family import Family, Header
from halfbyte.families.names import Name
from halfbyte.specs import ModelSpec

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    gemma3.FAMILY,
    gemma4.FAMILY,
    gemma4_assistant.FAMILY,
)

__all__ = ["FAMILIES", "Family", "Header", "Name", "config_of", "family_of", "spec_of"]


def spec_of(facts: Mapping[str, Any] | Header) -> ModelSpec:
    """The spec of a parsed config.json, or of a GGUF header.

    Raises `UnsupportedError` for an unknown architecture (and says which are known), and
    `IntegrityError` for a missing or absurd field.
    """
    if isinstance(facts, Header):
        architecture = str(facts.metadata.get("general.architecture"))
        for family in FAMILIES:
            if architecture in family.architectures:
                return family.from_header(facts)
        known = ", ".join(name for family in FAMILIES for name in family.architectures)
        raise UnsupportedError(
            f"unknown GGUF architecture '{architecture}'", hint=f"known: {known}"
        )
    if "model_type" not in facts:
        raise IntegrityError("the field 'model_type' is missing")
    kind = str(facts["model_type"])
    for family in FAMILIES:
        if kind in family.model_types:
            return family.from_config(facts)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UnsupportedError(f"unknown model type '{kind}'", hint=f"known: {known}")


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """A config.json of this spec, as Transformers has it for a text model.

    Raises `UnsupportedError` where none says all of it: layers that differ in some other way than
    the family's do, or a rope whose rule its divisors do not tell.
    """
    family = family_of(spec)
    config = None if family.to_config is None else family.to_config(spec)
    if config is None or spec_of(config) != spec:
        raise UnsupportedError(
            f"this model of the family {family.name} has no config.json that says all of it",
            hint="start from the original checkpoint, which has one",
        )
    return {**config, "architectures": [family.classes[config["model_type"]]]}


def family_of(spec: ModelSpec) -> Family:
    """The family that made this spec."""
    return next(family for family in FAMILIES if family.name == spec.family)
