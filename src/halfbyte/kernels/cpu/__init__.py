"""The native CPU op set: a step recorded once and replayed by C++ threads. Loads no torch."""

from halfbyte.kernels.cpu.ops import (
    INSTRUCTION_SETS,
    CPUOps,
    CPUStep,
    instruction_set,
    lacking,
)

__all__ = ["INSTRUCTION_SETS", "CPUOps", "CPUStep", "instruction_set", "lacking"]
