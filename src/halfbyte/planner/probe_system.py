"""What Linux says of the machine and of processes, read from /proc and /sys.

`root` is where those two are, so that readers can be tried on files of other machines. A file that
is missing, or that a container hides, is no error: what it would have said is unknown.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from halfbyte import env
from halfbyte.planner.doctor.facts import Disk, Memory, Processor

ROOT = Path("/")
NVIDIA = "0x10de"
DISPLAY = "0x03"  # the class of display controllers
NO_LIMIT = 2**60  # control groups write a huge number for none
UNFINISHED = ("*.part", "*.incomplete")
MOST_FILES = 100_000
SCHEDULING = (
    "/mnt/c/Windows/System32/reg.exe",
    "query",
    r"HKLM\SYSTEM\CurrentControlSet\Control\GraphicsDrivers",
    "/v",
    "HwSchMode",
)


def read_text(path: Path) -> str:
    """The text of a file, empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def processor(root: Path = ROOT) -> Processor:
    """The processor as it calls itself, and how many there are."""
    fields: dict[str, str] = {}
    present = 0
    for line in read_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        present += key.strip() == "processor"
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features") or ""
    return Processor(
        name=fields.get("model name") or platform.machine(),
        machine=platform.machine(),
        flags=frozenset(flags.split()),
        present=max(present, 1),
        usable=env.processor_count(root),
    )


def memory(root: Path = ROOT) -> Memory:
    """Memory and swap; what is available within the limit of the container, if there is one."""
    found: dict[str, int] = {}
    for line in read_text(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) * 1024 if value.split() else 0
    available = found.get("MemAvailable", found.get("MemFree", 0))
    limit, free = _container(root)
    return Memory(
        total=found.get("MemTotal", 0),
        available=available if free is None else min(available, free),
        swap_total=found.get("SwapTotal", 0),
        swap_free=found.get("SwapFree", 0),
        limit=limit,
    )


def _container(root: Path) -> tuple[int | None, int | None]:
    """The tightest limit of the groups around this process, and what it leaves free."""
    limits: list[tuple[int, int]] = []
    for group in env.control_groups("memory", root):
        limit = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if limit is None or limit >= NO_LIMIT:
            continue
        used = _number(group / "memory.current", group / "memory.usage_in_bytes") or 0
        limits.append((limit, max(0, limit - used + _reclaimable(group))))
    if not limits:
        return None, None
    return min(limit for limit, _ in limits), min(free for _, free in limits)


def _reclaimable(group: Path) -> int:
    """Pages of files that are given back when memory is wanted."""
    text = read_text(group / "memory.stat")
    match = re.search(r"^(?:total_)?inactive_file (\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def _number(*files: Path) -> int | None:
    texts = (read_text(file).strip() for file in files)
    return next((int(text) for text in texts if text.isdigit()), None)


def is_wsl(root: Path = ROOT) -> bool:
    """Whether this Linux runs inside Windows."""
    return "microsoft" in read_text(root / "proc/version").lower()


def modules(root: Path = ROOT) -> frozenset[str]:
    """Loaded modules of the kernel."""
    lines = read_text(root / "proc/modules").splitlines()
    return frozenset(line.split()[0] for line in lines if line.strip())


def nvidia_boards(root: Path = ROOT) -> int:
    """NVIDIA's display controllers on the bus."""
    devices = root / "sys/bus/pci/devices"
    return sum(
        read_text(device / "vendor").strip() == NVIDIA
        and read_text(device / "class").startswith(DISPLAY)
        for device in (devices.iterdir() if devices.is_dir() else ())
    )


def filesystem(path: Path, root: Path = ROOT) -> str:
    """The kind of filesystem that a path lies on, "" where unknown."""
    best, kind = "", ""
    for line in read_text(root / "proc/mounts").splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        place = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[1])
        inside = path == Path(place) or Path(place) in path.parents
        if inside and len(place) >= len(best):
            best, kind = place, fields[2]
    return kind


def disk(role: str, path: Path, root: Path = ROOT) -> Disk:
    """The disk that a folder lies on, or will lie on when it is made."""
    place = next((it for it in (path, *path.parents) if it.exists()), Path("/"))
    return Disk(
        role=role,
        path=str(path),
        free=shutil.disk_usage(place).free,
        writable=os.access(place, os.W_OK),
        filesystem=filesystem(place.resolve(), root),
    )


def downloads(cache: Path) -> tuple[int, int]:
    """How many blobs a hub cache holds, and the bytes of those that were broken off."""
    blobs = list(cache.glob("models--*/blobs/*"))[:MOST_FILES] if cache.is_dir() else []
    unfinished = [file for file in blobs if any(file.match(pattern) for pattern in UNFINISHED)]
    return len(blobs) - len(unfinished), sum(_size(file) for file in unfinished)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def gpu_scheduling() -> bool | None:
    """Whether Windows schedules cards in hardware, asked of its registry from WSL."""
    try:
        done = subprocess.run(SCHEDULING, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return scheduling_of(done.stdout)


def scheduling_of(text: str) -> bool | None:
    """What the registry's answer says: 2 is on, 1 off, nothing unknown."""
    match = re.search(r"HwSchMode\s+REG_DWORD\s+0x(\d+)", text)
    return int(match[1], 16) == 2 if match else None


def process_name(pid: int, root: Path = ROOT) -> str:
    """The name of a process, without its arguments, "?" where it cannot be read."""
    return read_text(root / f"proc/{pid}/comm").strip() or "?"


def process_memory(pid: int, root: Path = ROOT) -> tuple[int, int] | None:
    """Bytes of a process that are resident, and the most that ever were; None if it is gone."""
    sizes = {
        line.split()[0]: int(line.split()[1]) * 1024
        for line in read_text(root / f"proc/{pid}/status").splitlines()
        if line.startswith(("VmRSS:", "VmHWM:"))
    }
    if "VmRSS:" not in sizes:
        return None
    return sizes["VmRSS:"], sizes.get("VmHWM:", sizes["VmRSS:"])


def process_start(pid: int, root: Path = ROOT) -> int | None:
    """When a process began, in ticks since the machine did: with the pid it names one process."""
    text = read_text(root / f"proc/{pid}/stat")
    fields = text.rpartition(")")[2].split()
    return int(fields[19]) if len(fields) > 19 else None


def processes_named(name: str, root: Path = ROOT) -> list[int]:
    """Other processes that run under this name."""
    return [
        int(folder.name)
        for folder in (root / "proc").iterdir()
        if folder.name.isdigit()
        and int(folder.name) != os.getpid()
        and process_name(int(folder.name), root) == name
    ]
