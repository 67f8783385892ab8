"""What a family file provides: the way from a config or GGUF header to a spec, and its names.

`Header` is what a GGUF file says before its weights; a family reads facts from the metadata and,
where llama.cpp does, from the presence and shape of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.families.fields import Fields
from halfbyte.families.names import Name
from halfbyte.specs import AttentionSpec, ModelSpec, RopeSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A GGUF header: metadata, tensor shapes (rows first), and the rope divisors if stored."""

    metadata: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    rope_divisors: tuple[float, ...] | None = None

    def fields(self) -> Fields:
        """The metadata of this architecture, without its prefix."""
        return Fields(self.metadata, prefix=f"{self.metadata['general.architecture']}.")


def with_ropes(spec: ModelSpec, rope_of_layer: Callable[[AttentionSpec], RopeSpec]) -> ModelSpec:
    """The same model with another rope in every layer."""
    layers = tuple(
        replace(
            layer,
            attention=replace(layer.attention, rope=rope_of_layer(layer.attention)),
        )
        for layer in spec.layers
    )
    return replace(spec, layers=layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family of models. `model_types` are config.json's, `architectures` are GGUF's.

    `to_config`: a config.json of the text model, which `from_config` reads back as the same spec.
    `classes`: the class in Transformers of each model type that is a text model.
    `published`: a model as its makers would have described it, as far as that is a rule of theirs
    (rope bases and scalings); where there is no rule, the model as it is.
    `prefixes`: what stands before the names of the text model in a Hugging Face checkpoint.
    `ignored`: beginnings or ends of the full names of tensors that a text model has no use for.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    prefixes: tuple[str, ...]
    from_config: Callable[[Mapping[str, Any]], ModelSpec]
    from_header: Callable[[Header], ModelSpec]
    to_metadata: Callable[[ModelSpec], dict[str, Any]]
    names: Callable[[ModelSpec], dict[str, Name]]
    ignored: tuple[str, ...] = field(default=())
    to_config: Callable[[ModelSpec], dict[str, Any]] | None = None
    classes: Mapping[str, str] = field(default_factory=dict[str, str])
    published: Callable[[ModelSpec], ModelSpec] = lambda spec: spec
