"""What this machine has for a model, and what this process takes of it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

from halfbyte.planner import probe_system
from halfbyte.specs import DeviceKind, Machine


def resident_bytes() -> int:
    """The memory of this process that is resident now; its peak where the system does not say."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return peak_bytes()
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory of this process that was ever resident.

    On Linux not ru_maxrss: that begins with the peak of the process which started this one.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """The peak begins anew with what is resident now, where the system allows that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def release() -> None:
    """What nobody needs any more goes back to the system, where the C library can do that."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def this_machine(kind: DeviceKind = "cpu") -> Machine:
    """The machine as it is now; what a card is in is its host. Bandwidth is asked for apart:
    measuring takes a moment."""
    if kind == "cuda":
        return _card()
    memory, found = probe_system.memory(), probe_system.processor()
    total = memory.total if memory.limit is None else min(memory.total, memory.limit)
    return Machine(
        name=found.name,
        kind="cpu",
        memory_bytes=total,
        used_bytes=max(0, total - memory.available),
        processors=found.usable,
    )


def _card() -> Machine:
    """The first CUDA device."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return Machine(
        name=torch.cuda.get_device_name(),
        kind="cuda",
        memory_bytes=total,
        used_bytes=total - free,
        host=this_machine(),
    )
