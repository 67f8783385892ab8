"""Which op set runs where, chosen once when a model is loaded."""

from __future__ import annotations

from halfbyte import env
from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.kernels.contract import OpSet
from halfbyte.specs import DType, ModelSpec

# Below this many parameters a second thread costs more in waiting than it computes.
SMALL = 50_000_000


def choose(
    spec: ModelSpec, device: str = "auto", dtype: DType = "auto", *, threads: int | None = None
) -> OpSet:
    """The op set that runs a model on a device ("auto", "cpu", "cuda", "cuda:1").

    "auto" is cuda where there is a usable one. dtype "auto" rounds the inputs of block-quantized
    linears to int8 on a CPU and runs bf16 operands on a GPU; "f32" rounds nothing. `threads` is
    the number of compute threads; by default HALFBYTE_THREADS, else one for a small model, else
    all the processors this process may use.
    """
    import torch

    from halfbyte.kernels.reference import ReferenceOps

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"unknown device '{device}'", hint="auto, cpu, cuda or cuda:INDEX")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("there is no usable CUDA device", hint="use --device cpu")
    threads = threads or env.thread_count() or (1 if spec.parameters < SMALL else None)
    if threads is not None:
        torch.set_num_threads(threads)
    automatic = "q8_0" if kind == "cpu" else "bf16"
    return ReferenceOps(device, activations=automatic if dtype == "auto" else dtype)
