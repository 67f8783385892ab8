"""The only file that asks the machine what it is doing."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

from halfbyte import env
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


def this_machine(kind: DeviceKind = "cpu") -> Machine:
    """The machine as it is now. Its bandwidth is asked for apart: measuring takes a moment."""
    if kind == "cuda":
        return _card()
    total, available = _memory()
    limit = _container_limit()
    total, available = min(total, limit), min(available, limit)
    return Machine(
        name=processor_name(),
        kind="cpu",
        memory_bytes=total,
        used_bytes=total - available,
        processors=env.processor_count(),
    )


def processor_name() -> str:
    """As the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory() -> tuple[int, int]:
    """All memory, and what processes may still take without swapping."""
    fields = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    return fields["MemTotal"], fields["MemAvailable"]


def _container_limit() -> int:
    """The memory limit of the container, a huge number where there is none."""
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return 2**62 if text == "max" else int(text)


def _card() -> Machine:
    """The first CUDA device."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return Machine(
        name=torch.cuda.get_device_name(), kind="cuda", memory_bytes=total, used_bytes=total - free
    )
