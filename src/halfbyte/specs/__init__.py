"""Frozen facts: what a model is, how a tensor is stored, what a caller asked for.

Standard library only. All byte arithmetic lives on this floor, so that a plan can be made
without torch and without the weights.
"""

from halfbyte.specs.adapter import LowRankSpec, linears
from halfbyte.specs.cut import check_cut, cuts, divided_name, parted, parts_of
from halfbyte.specs.drafter import CentroidSpec, DrafterSpec
from halfbyte.specs.loading import (
    AUTO,
    Draft,
    DType,
    KVType,
    LoadOptions,
    Method,
    SolveMethod,
    most_drafts,
)
from halfbyte.specs.machine import DeviceKind, Machine
from halfbyte.specs.model import (
    Activation,
    AttentionSpec,
    ExpertSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    Part,
    PerLayerSpec,
    RopeSpec,
    TensorSpec,
)
from halfbyte.specs.pairing import paired_layers
from halfbyte.specs.plan import Basis, Place, Plan, Row, Setup, plan_of
from halfbyte.specs.prefix import common
from halfbyte.specs.request import Guide, Request, SamplingParams
from halfbyte.specs.scheme import (
    RECIPES,
    SCHEMES,
    Recipe,
    Scheme,
    holds,
    lossless_target,
    recipe_of,
    scheme_of,
)

__all__ = [
    "AUTO",
    "RECIPES",
    "SCHEMES",
    "Activation",
    "AttentionSpec",
    "Basis",
    "CentroidSpec",
    "DType",
    "DeviceKind",
    "Draft",
    "DrafterSpec",
    "ExpertSpec",
    "Guide",
    "KVType",
    "LayerSpec",
    "LoadOptions",
    "LowRankSpec",
    "MLPSpec",
    "Machine",
    "Method",
    "ModelSpec",
    "Part",
    "PerLayerSpec",
    "Place",
    "Plan",
    "Recipe",
    "Request",
    "RopeSpec",
    "Row",
    "SamplingParams",
    "Scheme",
    "Setup",
    "SolveMethod",
    "TensorSpec",
    "check_cut",
    "common",
    "cuts",
    "divided_name",
    "holds",
    "linears",
    "lossless_target",
    "most_drafts",
    "paired_layers",
    "parted",
    "parts_of",
    "plan_of",
    "recipe_of",
    "scheme_of",
]
