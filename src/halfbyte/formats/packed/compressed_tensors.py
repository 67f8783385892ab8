"""compressed-tensors checkpoints in the format `pack-quantized`, four bits and no quantized
activations: what llm-compressor writes for vLLM, and Google for Gemma's W4A16.

    weight_packed      int32 [N, K / 8]        eight columns in a word, lowest bits first, q + 8
    weight_scale       bf16, f16 or f32 [N, K / G], one column for a scale per row
    weight_shape       int64 [2]
    weight_zero_point  int32 [N / 8, K / G]    eight rows in a word, zero + 8; if not symmetric
    weight_g_idx       int32 [K]               the group of each input channel; older files only

A weight is scale * (q - zero). Which settings belong to which matrix the tensors' own shapes say;
each must be one of the `config_groups`.
Source: compressed-tensors 0.20 (compressors/pack_quantized, quantization/quant_config.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.errors import IntegrityError
from halfbyte.families.fields import Fields
from halfbyte.formats.packed.groups import SCALES, Grouping, assemble, group_of, in_order, nibbles
from halfbyte.formats.packed.matrix import Description, Parts
from halfbyte.formats.packed.settings import FIELD, group_size, refuse_unknown, require, table
from halfbyte.numerics.qtensor import QTensor

FORMAT = "pack-quantized"
KNOWN = ("config_groups", "format", "global_compression_ratio", "ignore", "quant_method",
         "quantization_status", "version")  # fmt: skip
KNOWN_OF_GROUPS = ("format", "targets", "weights")
KNOWN_OF_WEIGHTS = ("actorder", "group_size", "num_bits", "observer", "observer_kwargs",
                    "scale_dtype", "strategy", "symmetric", "type", "zp_dtype")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way in which the checkpoint stores matrices. `size` is None for a scale per row."""

    size: int | None
    symmetric: bool


def packing_of(settings: Fields) -> PackQuantized:
    """The layout that the settings describe."""
    refuse_unknown(settings, KNOWN)
    require(settings, "format", (FORMAT,))
    require(settings, "quantization_status", ("compressed",), "compressed")
    groups = settings.table("config_groups")
    names = list(groups.values)
    if not names:
        raise IntegrityError(f"{FIELD}.config_groups is empty")
    prefix = f"{settings.prefix}config_groups"
    found = (table(groups.table(name).values, f"{prefix}.{name}") for name in names)
    return PackQuantized(settings=tuple(_setting(group) for group in found))


def _setting(group: Fields) -> Setting:
    refuse_unknown(group, KNOWN_OF_GROUPS)
    require(group, "format", (FORMAT,), FORMAT)
    weights = table(group.table("weights").values, f"{group.prefix}weights")
    refuse_unknown(weights, KNOWN_OF_WEIGHTS)
    require(weights, "num_bits", (4,))
    require(weights, "type", ("int",), "int")
    strategy = require(weights, "strategy", ("group", "channel"))
    size = group_size(weights) if strategy == "group" else None
    return Setting(size=size, symmetric=weights.flag("symmetric", True))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackQuantized:
    """The settings that a matrix may have."""

    settings: tuple[Setting, ...]
    mark: str = "weight_packed"
    parts: Collection[str] = (
        "weight_packed",
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
    )

    def describe(self, parts: Parts) -> Description:
        return self._grouping(parts).describe()

    def unpack(self, parts: Parts) -> QTensor:
        grouping = self._grouping(parts)
        rows, width = grouping.shape
        words = parts.array("weight_packed", "I32", (rows, -(-width // 8)))
        return assemble(
            grouping,
            pairs=words.view(np.uint8)[:, : -(-width // 2)],
            scales=parts.array("weight_scale", grouping.scale, (rows, grouping.groups)),
            zeros=_zeros(parts, grouping) if grouping.zero else None,
            group_of=_group_of(parts, grouping) if grouping.sorted_columns else None,
        )

    def _grouping(self, parts: Parts) -> Grouping:
        rows, width = (int(size) for size in parts.array("weight_shape", "I64 I32", (2,)))
        if rows < 1 or width < 1:
            raise IntegrityError(f"weight_shape is [{rows}, {width}]", where=parts.module)
        groups = parts.shape("weight_scale", SCALES, 2)[1]
        zero = "weight_zero_point" in parts
        sizes = [
            setting.size or width
            for setting in self.settings
            if setting.symmetric != zero and -(-width // (setting.size or width)) == groups
        ]
        if not sizes:
            raise IntegrityError(
                f"{groups} scales in a row of {width}, {'with' if zero else 'no'} zero points: "
                f"none of {FIELD}.config_groups has that (group_size, symmetric)",
                where=parts.module,
            )
        plain = Grouping(
            shape=(rows, width), size=sizes[0], scale=parts.dtype("weight_scale", SCALES), zero=zero
        )
        if "weight_g_idx" not in parts or in_order(_group_of(parts, plain), plain):
            return plain
        return replace(plain, sorted_columns=True)


def _group_of(parts: Parts, grouping: Grouping) -> np.ndarray:
    return group_of(parts, "weight_g_idx", grouping)


def _zeros(parts: Parts, grouping: Grouping) -> np.ndarray:
    """uint8 [N, groups]."""
    rows = grouping.shape[0]
    words = parts.array("weight_zero_point", "I32", (-(-rows // 8), grouping.groups))
    return nibbles(words.T)[:, :rows].T
