"""AWQ checkpoints in AutoAWQ's "gemm" layout.

    qweight int32 [K, N / 8]        eight columns of the transposed weight in a word
    scales  f16 [K / G, N]
    qzeros  int32 [K / G, N / 8]

A weight is scale * (q - zero). Within a word the columns lie in the order 0, 2, 4, 6, 1, 3, 5, 7,
lowest bits first. Source: AutoAWQ 0.2.9 (modules/linear/gemm.py, utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from halfbyte.errors import IntegrityError
from halfbyte.families.fields import Fields
from halfbyte.formats.packed.groups import SCALES, Grouping, assemble, nibbles, pairs_of
from halfbyte.formats.packed.matrix import Description, Parts
from halfbyte.formats.packed.settings import FIELD, group_size, refuse_unknown, require
from halfbyte.numerics.qtensor import QTensor

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of the columns, in a word
HISTORY = ("backend", "exllama_config", "fuse_max_seq_len", "meta", "modules_to_fuse",
           "modules_to_not_convert")  # fmt: skip
KNOWN = ("bits", "format", "group_size", "method", "q_group_size", "quant_method", "version",
         "w_bit", "zero_point", *HISTORY)  # fmt: skip


def packing_of(settings: Fields) -> AWQPacking:
    """The layout that the settings describe; older files say w_bit and q_group_size."""
    refuse_unknown(settings, KNOWN)
    require(settings, _present(settings, "bits", "w_bit"), (4,))
    require(settings, "zero_point", (True,), True)
    layout = _present(settings, "version", "format")
    require(settings, layout, ("gemm", "GEMM"), "gemm")
    return AWQPacking(size=group_size(settings, _present(settings, "group_size", "q_group_size")))


def _present(settings: Fields, key: str, other: str) -> str:
    """Whichever of two names for one thing is there."""
    if settings.get(key) is None or settings.get(other) is None:
        return other if settings.get(key) is None and settings.get(other) is not None else key
    if settings.get(key) != settings.get(other):
        raise IntegrityError(f"{FIELD}.{key} and {FIELD}.{other} differ")
    return key


@dataclass(frozen=True, slots=True, kw_only=True)
class AWQPacking:
    """`size`: weights in a group, None for a whole row."""

    size: int | None
    mark: str = "qweight"
    parts: Collection[str] = ("qweight", "qzeros", "scales")

    def describe(self, parts: Parts) -> Description:
        return self._grouping(parts).describe()

    def unpack(self, parts: Parts) -> QTensor:
        grouping = self._grouping(parts)
        rows = grouping.shape[0]
        zeros = parts.array("qzeros", "I32", (grouping.groups, rows // 8))
        return assemble(
            grouping,
            pairs=pairs_of(_columns(parts.array("qweight", "I32")).T),
            scales=parts.array("scales", grouping.scale, (grouping.groups, rows)).T,
            zeros=_columns(zeros).T,
        )

    def _grouping(self, parts: Parts) -> Grouping:
        width, words = parts.shape("qweight", "I32", 2)
        size = self.size or width
        return Grouping(
            shape=(8 * words, width), size=size, scale=parts.dtype("scales", SCALES), zero=True
        )


def _columns(words: np.ndarray) -> np.ndarray:
    """int32 [n, N / 8] -> uint8 [n, N]."""
    stored = nibbles(words)
    return stored.reshape(len(stored), -1, 8)[..., PLACES].reshape(stored.shape)
