"""The two orders of the rows of q and k.

A rotary embedding turns pairs of numbers. Ours (and Hugging Face's) are (i, i + d/2) in a head of d
rows; GGUF files of some architectures hold neighbours instead: 0, d/2, 1, d/2 + 1, ... Only whole
rows move, so both ways are exact in every scheme. A vector (a bias) moves number by number.
"""

from __future__ import annotations

import numpy as np

from halfbyte.numerics.qtensor import QTensor


def to_pairs(tensor: QTensor, heads: int) -> QTensor:
    """From halves to neighbouring pairs, as a GGUF stores them; a copy."""
    return _taken(tensor, _order(tensor, heads))


def to_halves(tensor: QTensor, heads: int) -> QTensor:
    """The inverse of `to_pairs`."""
    return _taken(tensor, np.argsort(_order(tensor, heads)))


def _order(tensor: QTensor, heads: int) -> np.ndarray:
    """The row of ours at each place of the pair order, int64 [rows]."""
    return np.arange(tensor.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _taken(tensor: QTensor, order: np.ndarray) -> QTensor:
    rows = tensor.data.reshape(len(order), -1)
    width = tensor.width if len(tensor.shape) > 1 else 1
    taken = QTensor(tensor.scheme, (len(order), width), rows).take_rows(order)
    return QTensor(tensor.scheme, tensor.shape, taken.data.reshape(tensor.data.shape))
