"""The Triton op set: a step recorded as launches, and on a GPU replayed as a CUDA graph."""

from halfbyte.kernels.triton.cells import TritonKV
from halfbyte.kernels.triton.ops import Recorded, TritonOps

__all__ = ["Recorded", "TritonKV", "TritonOps"]
