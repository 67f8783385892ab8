"""Stored tensors: what they hold (`QTensor`), and the codecs between bytes and weights.

The package itself imports no torch, so that files can be read and planned without it; the codecs
are in `halfbyte.numerics.codec`.
"""

from halfbyte.numerics.qtensor import QTensor

__all__ = ["QTensor"]
