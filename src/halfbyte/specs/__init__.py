"""Frozen facts: what a model is, how a tensor is stored, what a caller asked for.

Standard library only. All byte arithmetic lives on this floor, so that a plan can be made
without torch and without the weights.
"""

from halfbyte.specs.adapter import LowRankSpec, linears
from halfbyte.specs.loading import DType, KVType, LoadOptions, Method
from halfbyte.specs.model import (
    Activation,
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    PerLayerSpec,
    RopeSpec,
    TensorSpec,
)
from halfbyte.specs.request import Request, SamplingParams
from halfbyte.specs.scheme import (
    SCHEMES,
    Recipe,
    Scheme,
    lossless_target,
    recipe_of,
    scheme_of,
)

__all__ = [
    "SCHEMES",
    "Activation",
    "AttentionSpec",
    "DType",
    "ExpertSpec",
    "KVType",
    "LayerSpec",
    "LoadOptions",
    "LowRankSpec",
    "MLPSpec",
    "Method",
    "ModelSpec",
    "PerLayerSpec",
    "Recipe",
    "Request",
    "RopeSpec",
    "SamplingParams",
    "Scheme",
    "TensorSpec",
    "linears",
    "lossless_target",
    "recipe_of",
    "scheme_of",
]
