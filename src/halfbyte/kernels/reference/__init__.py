"""The reference op set: plain torch, any device, autograd; the oracle of every other op set."""

from halfbyte.kernels.reference.ops import ReferenceOps

__all__ = ["ReferenceOps"]
