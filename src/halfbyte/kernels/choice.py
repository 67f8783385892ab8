"""Which op set runs where, chosen once when a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte import env
from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.kernels.contract import OpSet
from halfbyte.kernels.cpu import INSTRUCTION_SETS, CPUOps, instruction_set, lacking
from halfbyte.kernels.relay import Front
from halfbyte.specs import DType, ModelSpec, check_cut, cuts

if TYPE_CHECKING:
    from halfbyte.kernels.reference import ReferenceOps

# The oldest cards that Triton makes code for.
OLDEST = (7, 5)
# Below this many parameters a second thread of torch costs more in waiting than it computes.
SMALL = 50_000_000
DRIVERS = ("/proc/driver/nvidia", "/dev/dxg")  # of Linux, and of Linux in Windows


@dataclass(frozen=True, slots=True)
class Offer:
    """An op set on this machine: `lacks` says why it does not run here; None where it does."""

    name: str
    device: str
    lacks: str | None


def offers() -> tuple[Offer, ...]:
    """Every op set, the fastest of a device first. Imports torch only where there is a driver."""
    native = [Offer(f"native CPU ({name})", "cpu", lacking(name)) for name in INSTRUCTION_SETS]
    return (
        Offer("Triton", "cuda", _lacks_triton()),
        Offer("reference", "cuda", _lacks_cuda()),
        *native,
        Offer("reference", "cpu", None),
    )


def choose(
    spec: ModelSpec, device: str = "auto", dtype: DType = "auto", *, threads: int | None = None
) -> OpSet:
    """The op set that runs a model on a device ("auto", "cpu", "cuda", "cuda:1").

    "auto" is cuda where there is a usable one. dtype "auto" rounds the inputs of block-quantized
    linears to int8 on a CPU and runs bf16 operands on a GPU; "f32" rounds nothing. "auto" means the
    native op set on a CPU and Triton's on a GPU; the reference runs where that is not there or not
    for this processor, card or model (`declined` says which), and on a CPU for "f32" and "bf16".
    `threads` is the number of compute threads; by default
    HALFBYTE_THREADS, else the processors this process may use.
    """
    device = usable(device)
    threads = threads or env.thread_count()
    native = instruction_set() is not None and CPUOps.lacks(spec) is None
    if device.startswith("cpu") and dtype == "auto" and native:
        return CPUOps(threads=threads or env.processor_count())
    if device.startswith("cuda") and declined(spec, device) is None:
        return _triton(device, dtype)
    return _reference(spec, device, dtype, threads, exact_rows=True)


def choose_front(
    spec: ModelSpec,
    device: str,
    card_layers: int | None,
    dtype: DType = "auto",
    *,
    threads: int | None = None,
) -> Front | None:
    """The CPU's op set for what is before the last `card_layers`, which a card has; None where the
    device has all. `InvalidInputError` where there is no card, or no such cut."""
    if card_layers is None:
        return None
    if not usable(device).startswith("cuda"):
        raise InvalidInputError(
            "--card-layers is for a card, and the model runs on the CPU", hint="give --device cuda"
        )
    check_cut(spec, card_layers)
    if card_layers not in cuts(spec):
        return None
    exact: DType = "f32" if dtype == "f32" else "auto"
    return Front(choose(spec, "cpu", exact, threads=threads), card_layers)


def declined(spec: ModelSpec, device: str) -> str | None:
    """Why the reference would run on a GPU; None where Triton's kernels do, and on a CPU."""
    if not usable(device).startswith("cuda"):
        return None
    from halfbyte.kernels.triton import TritonOps  # only where there is a GPU

    return _lacks_triton(usable(device)) or TritonOps.lacks(spec)


def oracle(spec: ModelSpec, device: str = "auto", *, threads: int | None = None) -> ReferenceOps:
    """What others are measured against: the reference op set in f32.

    It reads whole texts, so products run whole: twice as fast, and the same to f32 accuracy.
    """
    threads = threads or env.thread_count()
    return _reference(spec, usable(device), "f32", threads, exact_rows=False)


def usable(device: str) -> str:
    """The device, "auto" resolved; an error for one that is not there."""
    if device == "auto":
        return "cuda" if _has_cuda() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InvalidInputError(f"unknown device '{device}'", hint="auto, cpu, cuda or cuda:INDEX")
    if kind == "cuda" and not _has_cuda():
        raise UnsupportedError("there is no usable CUDA device", hint="use --device cpu")
    return device


def _reference(
    spec: ModelSpec, device: str, dtype: DType, threads: int | None, *, exact_rows: bool
) -> ReferenceOps:
    import torch

    from halfbyte.kernels.reference import ReferenceOps

    threads = threads or (1 if spec.parameters < SMALL else None)
    if threads is not None:
        torch.set_num_threads(threads)
    automatic = "q8_0" if device == "cpu" else "bf16"
    activations = automatic if dtype == "auto" else dtype
    return ReferenceOps(device, activations=activations, exact_rows=exact_rows)


def _triton(device: str, dtype: DType) -> OpSet:
    from halfbyte.kernels.triton import TritonOps
    from halfbyte.kernels.triton.device import Device

    return TritonOps(Device(device), operands="f32" if dtype == "f32" else "bf16")


def _has_cuda() -> bool:
    return _lacks_cuda() is None


def _lacks_cuda() -> str | None:
    """Why no CUDA device is usable; None if one is. Torch is imported only where a driver is."""
    if not any(Path(place).exists() for place in DRIVERS):
        return "there is no NVIDIA driver"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no device that its CUDA can use"


def _lacks_triton(device: str = "cuda") -> str | None:
    """Why Triton's kernels do not run on a CUDA device; None if they do."""
    lacking = _lacks_cuda()
    if lacking is not None:
        return lacking
    if find_spec("triton") is None:
        return "triton is not installed"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    oldest = ".".join(map(str, OLDEST))
    return f"compute capability {major}.{minor}, not {oldest}" if (major, minor) < OLDEST else None
