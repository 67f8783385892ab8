"""Four-bit integers in groups of a row under one scale, as GPTQ, AWQ and compressed-tensors have
them, in the bytes of our `int4` and `uint4` schemes.

Those have groups of 32 or 128; a longer group becomes several with the same scale, which changes no
weight. The scales stay the fp16 or bf16 numbers they are. Where groups are not stretches of columns
(act-order), or scales are f32, or a width is no multiple of 32, there is no such scheme: the
weights are computed in f32, scale * (q - zero), and no number is rounded further.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.formats.packed.matrix import Description, Parts
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, Scheme

SUFFIXES = {"BF16": "", "F16": "-f16"}
SCALES = "BF16 F16 F32"
F32 = SCHEMES["f32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    """How a matrix [rows, width] is grouped: `size` columns share a scale of type `scale` (BF16,
    F16 or F32), and a zero point if `zero`. `sorted_columns`: a column's group is in a list."""

    shape: tuple[int, int]
    size: int
    scale: str
    zero: bool
    sorted_columns: bool = False

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.size)

    def describe(self) -> Description:
        reason = self._why_decoded()
        scheme = self._scheme() if reason is None else F32
        return Description(scheme=scheme, shape=self.shape, decoded=reason)

    def _why_decoded(self) -> str | None:
        if self.sorted_columns:
            return "columns grouped by activation order (g_idx)"
        if self.scale not in SUFFIXES:
            return f"scales in {self.scale}"
        if self.shape[1] % 32:
            return "widths that are no multiple of 32"
        return None

    def _scheme(self) -> Scheme:
        width = self.shape[1]
        if self.size % 32 and self.groups > 1:
            raise UnsupportedError(f"groups of {self.size} weights", hint="multiples of 32")
        long = (self.size % 128 == 0 or self.groups == 1) and width % 128 == 0
        kind = "uint4" if self.zero else "int4"
        return SCHEMES[f"{kind}-g{128 if long else 32}{SUFFIXES[self.scale]}"]


def assemble(
    grouping: Grouping,
    *,
    pairs: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    group_of: np.ndarray | None = None,
) -> QTensor:
    """The matrix of its parts.

    `pairs` uint8 [rows, width / 2]: columns 2j (low nibble) and 2j + 1. `scales` [rows, groups] as
    they are stored, bf16 as its bits. `zeros` uint8 [rows, groups], 8 where None. `group_of` int
    [width]: the group of each column, where that is not column // size.
    """
    scheme = grouping.describe().scheme
    if scheme == F32:
        return _decoded(grouping, pairs, scales, zeros, group_of)
    rows, width = grouping.shape
    per_row = width // scheme.block
    owner = np.arange(per_row) * scheme.block // grouping.size  # the group of each block
    blocks = np.empty((rows, per_row, scheme.block_bytes), dtype=np.uint8)
    blocks[..., :2] = np.ascontiguousarray(scales[:, owner])[..., None].view(np.uint8)
    if zeros is not None:
        blocks[..., 2] = zeros[:, owner]
    blocks[..., -scheme.block // 2 :] = pairs.reshape(rows, per_row, -1)
    return QTensor(scheme, grouping.shape, blocks.reshape(rows, -1))


def _decoded(
    grouping: Grouping,
    pairs: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    group_of: np.ndarray | None,
) -> QTensor:
    rows, width = grouping.shape
    owner = np.arange(width) // grouping.size if group_of is None else group_of
    integers = np.empty((rows, pairs.shape[1], 2), dtype=np.int8)
    integers[..., 0], integers[..., 1] = pairs & 15, pairs >> 4
    zero = 8 if zeros is None else zeros[:, owner].astype(np.int8)
    flat = integers.reshape(rows, -1)[:, :width] - zero
    weights = _floats(scales, grouping.scale)[:, owner] * flat
    assert weights.size == prod(grouping.shape)
    return QTensor(F32, grouping.shape, weights.astype("<f4").view(np.uint8))


def _floats(scales: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (scales.astype(np.uint32) << 16).view(np.float32)
    return scales.astype(np.float32)


def nibbles(words: np.ndarray) -> np.ndarray:
    """int32 [..., n] -> uint8 [..., 8 * n], the lowest four bits first."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([stored & 15, stored >> 4], axis=-1).reshape(*words.shape[:-1], -1)


def pairs_of(columns: np.ndarray) -> np.ndarray:
    """uint8 [rows, width] below 16 -> [rows, width / 2]: column 2j in the low nibble of byte j."""
    return columns[:, ::2] | (columns[:, 1::2] << 4)


def group_of(parts: Parts, ending: str, grouping: Grouping) -> np.ndarray:
    """The group of each column, int32 [width], as a part of the checkpoint says it."""
    found = parts.array(ending, "I32", grouping.shape[1:])
    if not (found.min() >= 0 and found.max() < grouping.groups):
        raise IntegrityError(
            f"'{ending}' names groups outside of {grouping.groups}", where=parts.module
        )
    return found


def in_order(found: np.ndarray, grouping: Grouping) -> bool:
    """Whether the groups are stretches of columns, one after the other."""
    return bool(np.array_equal(found, np.arange(len(found)) // grouping.size))
