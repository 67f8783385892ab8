"""The native CPU op set: a step recorded once and replayed by C++ threads. Loads no torch."""

from halfbyte.kernels.cpu.ops import CPUOps, CPUStep, instruction_set

__all__ = ["CPUOps", "CPUStep", "instruction_set"]
