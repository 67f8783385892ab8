"""What the doctor knows of a machine: a snapshot, plain values, made by the probes.

Checks read this and nothing else, so that every fault can be planted without the hardware that has
it. None stands for "could not be found out", never for zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """`flags` as /proc/cpuinfo has them; `present` processors, of which `usable` are ours."""

    name: str
    machine: str = "x86_64"
    flags: frozenset[str] = frozenset()
    present: int = 1
    usable: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The compiled kernels: why they cannot be loaded, and the instruction sets that run here."""

    refusal: str | None
    runs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Torch:
    """An installed PyTorch, read without importing it. `cuda` is what it was built with, None for
    a CPU build; `cudnn` the release that it pins.

    Where there is a card it is asked itself, in a process of its own: `architectures` are those it
    was built for ("sm_86", "compute_90"), `refusal` what it said if it could not start.
    """

    version: str
    cuda: str | None = None
    cudnn: str | None = None
    architectures: tuple[str, ...] | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes. `limit` is that of the container, None where there is none."""

    total: int
    available: int
    swap_total: int = 0
    swap_free: int = 0
    limit: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Where one kind of our files goes. `filesystem` as /proc/mounts names it."""

    role: str
    path: str
    free: int
    writable: bool = True
    filesystem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardProcess:
    """Who uses a card; `bytes` is None where the driver does not tell."""

    pid: int
    name: str
    bytes: int | None
    ours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A card as its driver describes it. Widths are PCIe lanes, 0 where nobody said."""

    index: int
    name: str
    memory: int
    used: int
    capability: tuple[int, int] | None = None
    lanes: int = 0
    lanes_possible: int = 0
    processes: tuple[CardProcess, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """NVIDIA's driver, and the CUDA that it speaks at most."""

    version: str
    cuda: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphics:
    """Everything about cards. `boards` are NVIDIA's on the bus, whoever drives them.

    `refusal`: why the driver does not answer, where one is installed. `scheduling`: Windows'
    hardware-accelerated GPU scheduling, under WSL.
    """

    boards: int = 0
    modules: frozenset[str] = frozenset()
    driver: Driver | None = None
    refusal: str | None = None
    cards: tuple[Card, ...] = ()
    scheduling: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """The cache of downloads; `unfinished` are bytes of downloads that were broken off."""

    path: str
    files: int = 0
    unfinished: int = 0
    offline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """A machine. `packages` are installed releases by name, None for one that is absent;
    `required` the least release that we run with. `cudnn_files` are releases of cuDNN libraries
    that LD_LIBRARY_PATH puts before those of PyTorch, by path. `bandwidth`: measured, bytes per
    second."""

    python: str
    system: str
    processor: Processor
    memory: Memory
    native: Native
    wsl: bool = False
    packages: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    required: Mapping[str, str] = field(default_factory=dict[str, str])
    torch: Torch | None = None
    compiler: str | None = None
    headers: bool = True
    cudnn_files: Mapping[str, str] = field(default_factory=dict[str, str])
    disks: tuple[Disk, ...] = ()
    bandwidth: float | None = None
    graphics: Graphics = Graphics()
    hub: Hub | None = None


def numbers(version: str) -> tuple[int, ...]:
    """A release as numbers, for comparing: "2.13.0+cpu" is (2, 13, 0)."""
    found: list[int] = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)
