"""Checks of what there is to work with: processors, memory and its speed, disks, the hub cache."""

from __future__ import annotations

from collections.abc import Iterator

from halfbyte.planner.doctor.facts import GIB, MachineFacts
from halfbyte.planner.doctor.finding import Check, Said, fault, note, ok, warning

LITTLE_MEMORY = GIB
LITTLE_DISK = 5 * GIB
NO_DISK = GIB // 4
SLOW_MEMORY = 10e9  # less than one channel of DDR4 gives
# Filesystems across a network or another system, from which a mapped file is read slowly.
FOREIGN = frozenset({"9p", "drvfs", "nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "virtiofs"})


def processors(facts: MachineFacts) -> Iterator[Said]:
    """Fewer processors than the machine has: an affinity, or the share of a container."""
    found = facts.processor
    if found.usable < found.present:
        yield note(
            f"{found.usable} of {found.present} processors may be used ({found.name})",
            "raise the container's CPU limit or the affinity, if more threads are wanted",
        )
    else:
        yield ok(f"{found.name}, {found.usable} processors")


def memory_speed(facts: MachineFacts) -> Iterator[Said]:
    """Memory that reads slower than a single channel should; decoding is as fast as memory is."""
    if facts.bandwidth is None:
        return
    speed = f"memory reads {facts.bandwidth / 1e9:.1f} GB/s"
    if facts.bandwidth < SLOW_MEMORY:
        yield warning(
            f"{speed}, less than one channel gives",
            "stop what else uses the memory; fill the second channel; on a laptop, plug it in",
        )
    else:
        yield ok(f"{speed}, measured")


def free_memory(facts: MachineFacts) -> Iterator[Said]:
    """Memory that other processes have taken."""
    memory = facts.memory
    text = f"{_gib(memory.available)} of {_gib(memory.total)} memory are free"
    if memory.available < LITTLE_MEMORY:
        yield warning(text, "stop other processes; halfbyte top shows what ours take")
    else:
        yield ok(text)


def swap(facts: MachineFacts) -> Iterator[Said]:
    """Swap in use: what lies there is read back at the speed of a disk, weights too."""
    memory = facts.memory
    used = memory.swap_total - memory.swap_free
    if used > LITTLE_MEMORY:
        yield warning(
            f"{_gib(used)} are swapped out",
            "stop other processes, or plan with a smaller --budget, until swap is empty",
        )


def container(facts: MachineFacts) -> Iterator[Said]:
    """A container that allows less memory than the machine has, where tools show the machine's."""
    memory = facts.memory
    if memory.limit is not None and memory.limit < memory.total:
        yield note(
            f"the container allows {_gib(memory.limit)} of {_gib(memory.total)}; plans keep to it",
            "raise its memory limit if a plan does not fit",
        )


def disks(facts: MachineFacts) -> Iterator[Said]:
    """A folder of ours that cannot be written, is nearly full, or lies on another system's disk."""
    for disk in facts.disks:
        where = f"{disk.role} ({disk.path})"
        if not disk.writable:
            yield warning(
                f"{where} cannot be written: nothing new is kept there", _elsewhere(disk.role)
            )
        elif disk.free < NO_DISK:
            yield fault(f"{where} is full: {_gib(disk.free)} are free", _elsewhere(disk.role))
        elif disk.free < LITTLE_DISK:
            yield warning(f"{where} has {_gib(disk.free)} free", _elsewhere(disk.role))
        elif disk.filesystem in FOREIGN:
            yield warning(
                f"{where} lies on {disk.filesystem}: mapped weights are read slowly from there",
                _elsewhere(disk.role),
            )
        else:
            yield ok(f"{where} has {_gib(disk.free)} free")


def _elsewhere(role: str) -> str:
    variable = {"downloads": "HF_HOME", "kept models": "HALFBYTE_CACHE"}.get(role, "TMPDIR")
    return f"free some of it, or set {variable} to a folder on another disk"


def hub_cache(facts: MachineFacts) -> Iterator[Said]:
    """Downloads that were broken off and still take room; a hub that may not be asked."""
    hub = facts.hub
    if hub is None:
        return
    if hub.unfinished:
        yield note(
            f"{_gib(hub.unfinished)} of unfinished downloads in {hub.path}",
            "halfbyte pull NAME goes on where it stopped; or remove the .part and .incomplete "
            "files there",
        )
    if hub.offline:
        yield note("HF_HUB_OFFLINE is set: no hub is asked", "unset it to fetch models")
    if not hub.unfinished and not hub.offline:
        yield ok(f"hub cache with {hub.files} files")


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


CHECKS: tuple[Check[MachineFacts], ...] = (
    processors,
    memory_speed,
    free_memory,
    swap,
    container,
    disks,
    hub_cache,
)
