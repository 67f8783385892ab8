"""Which op set runs where, chosen once when a model is loaded."""

from __future__ import annotations

from pathlib import Path

from halfbyte import env
from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.kernels.contract import OpSet
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.specs import DType, ModelSpec

# Below this many parameters a second thread of torch costs more in waiting than it computes.
SMALL = 50_000_000


def choose(
    spec: ModelSpec,
    device: str = "auto",
    dtype: DType = "auto",
    *,
    threads: int | None = None,
    adapters: bool = False,
) -> OpSet:
    """The op set that runs a model on a device ("auto", "cpu", "cuda", "cuda:1").

    "auto" is cuda where there is a usable one. dtype "auto" rounds the inputs of block-quantized
    linears to int8 on a CPU and runs bf16 operands on a GPU; "f32" rounds nothing. On a CPU "auto"
    means the native op set; the reference runs where that is not built or not for this processor or
    model, with `adapters`, and for "f32" and "bf16". `threads` is the number of compute threads; by
    default HALFBYTE_THREADS, else the processors this process may use.
    """
    if device == "auto":
        device = "cuda" if _has_cuda() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"unknown device '{device}'", hint="auto, cpu, cuda or cuda:INDEX")
    if kind == "cuda" and not _has_cuda():
        raise UnsupportedError("there is no usable CUDA device", hint="use --device cpu")
    threads = threads or env.thread_count()
    native = instruction_set() is not None and CPUOps.lacks(spec) is None and not adapters
    if kind == "cpu" and dtype == "auto" and native:
        return CPUOps(threads=threads or env.processor_count())
    return _reference(spec, device, dtype, threads)


def _reference(spec: ModelSpec, device: str, dtype: DType, threads: int | None) -> OpSet:
    import torch

    from halfbyte.kernels.reference import ReferenceOps

    threads = threads or (1 if spec.parameters < SMALL else None)
    if threads is not None:
        torch.set_num_threads(threads)
    automatic = "q8_0" if device == "cpu" else "bf16"
    return ReferenceOps(device, activations=automatic if dtype == "auto" else dtype)


def _has_cuda() -> bool:
    """Whether torch finds a usable device; torch is imported only where a driver is."""
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/dxg").exists():
        return False
    import torch

    return torch.cuda.is_available()
