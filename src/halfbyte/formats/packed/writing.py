"""Our matrices in compressed-tensors' `pack-quantized`: the parts of each, and the settings of all.

The bytes are the same, in another order: integers, scales and zero points come out as they are
stored, the scales in their own type. A group of ours that was a part of a longer one stays a group
of ours. Source: compressed-tensors 0.20, as in `compressed_tensors`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from halfbyte.formats.packed.compressed_tensors import FORMAT
from halfbyte.formats.packed.groups import SUFFIXES
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import Scheme

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Ending of a part -> (type as in a safetensors header, shape)."""


def is_packable(scheme: Scheme) -> bool:
    return scheme.name.startswith(("int4-g", "uint4-g"))


def layout_of(scheme: Scheme, shape: tuple[int, ...]) -> Layout:
    """The parts of a matrix [N, K]."""
    rows, width = shape
    groups = width // scheme.block
    dtype = next(d for d, suffix in SUFFIXES.items() if scheme.name == _kind(scheme) + suffix)
    parts: Layout = {
        "weight_packed": ("I32", (rows, width // 8)),
        "weight_scale": (dtype, (rows, groups)),
        "weight_shape": ("I64", (2,)),
    }
    if _has_zero(scheme):
        parts["weight_zero_point"] = ("I32", (-(-rows // 8), groups))
    return parts


def parts_of(q: QTensor) -> dict[str, np.ndarray]:
    """The parts, in the order of `layout_of`."""
    rows, width = q.shape
    blocks = q.data.reshape(rows, width // q.scheme.block, q.scheme.block_bytes)
    parts = {
        "weight_packed": blocks[..., -q.scheme.block // 2 :],
        "weight_scale": blocks[..., :2],
        "weight_shape": np.array(q.shape, dtype="<i8"),
    }
    if _has_zero(q.scheme):
        parts["weight_zero_point"] = _packed_zeros(blocks[..., 2])
    return {ending: np.ascontiguousarray(part) for ending, part in parts.items()}


def _packed_zeros(zeros: np.ndarray) -> np.ndarray:
    """uint8 [N, groups] -> int32 [N / 8, groups]: eight rows in a word, lowest bits first."""
    padded = np.pad(zeros, ((0, -len(zeros) % 8), (0, 0)))
    eights = padded.reshape(-1, 8, zeros.shape[1]).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(eights << shifts, axis=1).astype("<u4")


def settings_for(linears: Mapping[str, Scheme], others: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint with these linears, by module; `others` are linears
    that are not quantized."""
    kinds = {(_has_zero(scheme), scheme.block): scheme for scheme in linears.values()}
    groups = {
        f"group_{index}": _group(
            scheme,
            ["Linear"] if len(kinds) == 1 else [m for m, s in linears.items() if _same(s, scheme)],
        )
        for index, scheme in enumerate(kinds.values())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(others),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not _has_zero(scheme),
        "strategy": "group",
        "group_size": scheme.block,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": FORMAT,
    }


def _has_zero(scheme: Scheme) -> bool:
    return scheme.name.startswith("uint4")


def _kind(scheme: Scheme) -> str:
    return scheme.name.removesuffix("-f16")


def _same(scheme: Scheme, other: Scheme) -> bool:
    """Whether two share their settings; those do not tell of the scale's type."""
    return _kind(scheme) == _kind(other)
