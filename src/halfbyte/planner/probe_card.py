"""What NVIDIA's driver says of its cards, asked through NVML without PyTorch.

NVML is a C library that comes with the driver; six of its calls are declared here. Where it is not
there, or does not answer, that is a fact like any other. Under WSL it does not tell what each
process uses.

Source: the NVML API reference (nvml.h).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from ctypes import byref, c_char, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import Any

from halfbyte.planner.doctor.facts import Card, CardProcess, Driver
from halfbyte.planner.probe_system import process_name

LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")
SUCCESS, TOO_SMALL = 0, 7
UNKNOWN = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
NAME_BYTES = 96
SPARE = 8  # processes that may begin between two calls


class _Memory(ctypes.Structure):
    """nvmlMemory_v2_t: `used` is without what the driver reserves for itself."""

    _fields_ = [
        ("version", c_uint),
        ("total", c_ulonglong),
        ("reserved", c_ulonglong),
        ("free", c_ulonglong),
        ("used", c_ulonglong),
    ]


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t of the third version."""

    _fields_ = [
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The driver and its cards; none of both where there is no driver. `refusal`: it is there, and
    does not answer."""

    driver: Driver | None = None
    cards: tuple[Card, ...] = ()
    refusal: str | None = None


class _RefusedError(Exception):
    """A call that NVML refused, in its words."""


def read(libraries: tuple[str, ...] = LIBRARIES) -> Reading:
    """All that NVML says now."""
    try:
        with _session(libraries) as nvml:
            if nvml is None:
                return Reading()
            return Reading(driver=_driver(nvml), cards=tuple(_cards(nvml)))
    except _RefusedError as error:
        return Reading(refusal=str(error))


def card_bytes(pid: int, cards: tuple[Card, ...]) -> int | None:
    """What a process holds on these cards together; None where the driver does not tell."""
    held = [it.bytes for card in cards for it in card.processes if it.pid == pid]
    known = [size for size in held if size is not None]
    return None if held and not known else sum(known)


class _NVML:
    """The loaded library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, name: str, *arguments: Any, wants: int = SUCCESS) -> int:
        """Runs one function. Raises for any other outcome than success and `wants`."""
        function = getattr(self._library, name, None)
        if function is None:
            raise _RefusedError(f"the driver has no {name}")
        outcome = int(function(*arguments))
        if outcome not in (SUCCESS, wants):
            raise _RefusedError(self._words(outcome))
        return outcome

    def number(self, name: str, *arguments: Any) -> int | None:
        """The whole number that a function gives, None where this card has none to give."""
        value = c_uint()
        try:
            self(name, *arguments, byref(value))
        except _RefusedError:
            return None
        return value.value

    def _words(self, outcome: int) -> str:
        function = self._library.nvmlErrorString
        function.restype = c_char_p
        text: bytes = function(outcome) or b""
        return text.decode(errors="replace") or f"error {outcome}"


@contextmanager
def _session(libraries: tuple[str, ...]) -> Generator[_NVML | None]:
    library = next(filter(None, map(_opened, libraries)), None)
    if library is None:
        yield None
        return
    nvml = _NVML(library)
    nvml("nvmlInit_v2")
    try:
        yield nvml
    finally:
        nvml("nvmlShutdown")


def _opened(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _driver(nvml: _NVML) -> Driver:
    version, cuda = (c_char * NAME_BYTES)(), c_int()
    nvml("nvmlSystemGetDriverVersion", version, c_uint(NAME_BYTES))
    nvml("nvmlSystemGetCudaDriverVersion_v2", byref(cuda))
    return Driver(
        version=version.value.decode(errors="replace"),
        cuda=(cuda.value // 1000, cuda.value % 1000 // 10),
    )


def _cards(nvml: _NVML) -> Iterator[Card]:
    for index in range(nvml.number("nvmlDeviceGetCount_v2") or 0):
        handle = c_void_p()
        nvml("nvmlDeviceGetHandleByIndex_v2", c_uint(index), byref(handle))
        yield _card(nvml, index, handle)


def _card(nvml: _NVML, index: int, handle: c_void_p) -> Card:
    name, memory = (c_char * NAME_BYTES)(), _Memory()
    nvml("nvmlDeviceGetName", handle, name, c_uint(NAME_BYTES))
    memory.version = ctypes.sizeof(_Memory) | 2 << 24
    nvml("nvmlDeviceGetMemoryInfo_v2", handle, byref(memory))
    return Card(
        index=index,
        name=name.value.decode(errors="replace"),
        memory=memory.total,
        used=memory.total - memory.free,
        capability=_capability(nvml, handle),
        lanes=nvml.number("nvmlDeviceGetCurrPcieLinkWidth", handle) or 0,
        lanes_possible=nvml.number("nvmlDeviceGetMaxPcieLinkWidth", handle) or 0,
        processes=tuple(_processes(nvml, handle)),
    )


def _capability(nvml: _NVML, handle: c_void_p) -> tuple[int, int] | None:
    major, minor = c_int(), c_int()
    try:
        nvml("nvmlDeviceGetCudaComputeCapability", handle, byref(major), byref(minor))
    except _RefusedError:
        return None
    return major.value, minor.value


def _processes(nvml: _NVML, handle: c_void_p) -> Iterator[CardProcess]:
    """Those that compute and those that draw; a process that does both is named once."""
    seen: set[int] = set()
    for kind in ("Compute", "Graphics"):
        for found in _listed(nvml, f"nvmlDeviceGet{kind}RunningProcesses_v3", handle):
            if found.pid not in seen:
                seen.add(found.pid)
                yield CardProcess(
                    pid=found.pid,
                    name=process_name(found.pid),
                    bytes=None if found.used == UNKNOWN else found.used,
                    ours=found.pid == os.getpid(),
                )


def _listed(nvml: _NVML, name: str, handle: c_void_p) -> list[_Process]:
    count = c_uint(0)
    call: Callable[..., int] = nvml
    try:
        if call(name, handle, byref(count), None, wants=TOO_SMALL) == SUCCESS:
            return []
        found = (_Process * (count.value + SPARE))()
        count.value = len(found)
        call(name, handle, byref(count), found)
    except _RefusedError:
        return []
    return list(found[: count.value])
