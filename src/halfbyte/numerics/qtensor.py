"""One stored tensor: its scheme, its logical shape and its bytes. Numpy only.

Every tensor of a model is one, also those in f32 or bf16, so that readers, the quantizer, kernels
and writers hand each other the very bytes that ship. It is a plain value: no arithmetic, no tensor
subclass, no conversion on the quiet (that is `codec`). The bytes may be a read-only view of a
mapped file; nothing here copies them, except `take_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.specs import Scheme


@dataclass(frozen=True, slots=True, eq=False)
class QTensor:
    """A tensor as it is stored.

    `shape` is the logical shape, rows first; the last axis is cut into blocks of `scheme`.
    `data` is uint8 [num_rows, row bytes], C-contiguous, with num_rows = prod(shape[:-1]): a vector
    is one row. Raises `IntegrityError` when shape and bytes do not fit each other.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    data: np.ndarray

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape[:-1], default=0) < 0 or self.shape[-1] < 1:
            raise IntegrityError(f"a stored tensor cannot have the shape {self.shape}")
        if self.width % self.scheme.block:
            raise IntegrityError(
                f"{self.scheme.name} stores blocks of {self.scheme.block} weights; "
                f"the shape {self.shape} does not end in whole blocks"
            )
        expected = (self.num_rows, self.scheme.row_bytes(self.width))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise IntegrityError(
                f"{self.scheme.name} of shape {self.shape} is uint8 {expected}, "
                f"not {self.data.dtype} {self.data.shape}"
            )
        if not self.data.flags.c_contiguous:
            raise IntegrityError("the bytes of a stored tensor lie row after row, without gaps")

    @property
    def width(self) -> int:
        """Weights per row."""
        return self.shape[-1]

    @property
    def num_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def blocks(self) -> np.ndarray:
        """The same bytes as uint8 [num_blocks, block_bytes]; a view. Rows must be only blocks."""
        assert not self.scheme.row_header, f"rows of {self.scheme.name} are more than blocks"
        return self.data.reshape(-1, self.scheme.block_bytes)

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows [start, stop) as a view of shape (stop - start, width)."""
        if not 0 <= start <= stop <= self.num_rows:
            raise InvalidInputError(f"rows [{start}, {stop}) of a tensor of {self.num_rows} rows")
        return QTensor(self.scheme, (stop - start, self.width), self.data[start:stop])

    def take_rows(self, order: np.ndarray) -> QTensor:
        """The rows named by `order` (integers [n]) as a copy of shape (n, width).

        Whole rows move, so a permutation or a selection is exact in every scheme.
        """
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise InvalidInputError(
                f"an order of rows is a list of integers, not {order.dtype} {order.shape}"
            )
        if order.size and not (order.min() >= 0 and order.max() < self.num_rows):
            raise InvalidInputError(
                f"rows {order.min()} to {order.max()} of a tensor of {self.num_rows} rows"
            )
        return QTensor(self.scheme, (order.size, self.width), self.data[order])
