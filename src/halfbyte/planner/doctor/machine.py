"""The facts of this machine, put together from the probes, and all checks of it.

Standard library only, and nothing of ours that is compiled: it works where halfbyte does not. Torch
is asked in a process of its own, and only where there is a card.
"""

from __future__ import annotations

import platform

from halfbyte import env
from halfbyte.planner import probe_card, probe_install, probe_system
from halfbyte.planner.doctor import graphics, installation, resources
from halfbyte.planner.doctor.facts import GIB, Disk, Graphics, Hub, MachineFacts
from halfbyte.planner.doctor.finding import Check

CHECKS: tuple[Check[MachineFacts], ...] = (
    *installation.CHECKS,
    *resources.CHECKS,
    *graphics.CHECKS,
)
ENOUGH_TO_MEASURE = GIB


def machine_facts(*, measure: bool = True) -> MachineFacts:
    """A snapshot of this machine, now. `measure`: the speed of its memory, too (a moment)."""
    wsl = probe_system.is_wsl()
    reading = probe_card.read()
    memory = probe_system.memory()
    native = probe_install.native()
    fast = measure and native.runs and memory.available > ENOUGH_TO_MEASURE
    compiler, headers = probe_install.compiler()
    required = probe_install.requirements()
    names = {*required, *(name for name, _ in installation.KNOWN_FAULTS), *probe_install.CUDNN}
    return MachineFacts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=probe_system.processor(),
        memory=memory,
        native=native,
        wsl=wsl,
        packages=probe_install.packages(sorted(names)),
        required=required,
        torch=probe_install.torch(ask=bool(reading.cards)),
        compiler=compiler,
        headers=headers,
        cudnn_files=probe_install.cudnn_files(env.library_path()),
        disks=_disks(),
        bandwidth=probe_install.bandwidth() if fast else None,
        graphics=Graphics(
            boards=probe_system.nvidia_boards(),
            modules=probe_system.modules() & {"nouveau", "nvidia"},
            driver=reading.driver,
            refusal=reading.refusal,
            cards=reading.cards,
            scheduling=probe_system.gpu_scheduling() if wsl and reading.cards else None,
        ),
        hub=_hub(),
    )


def _disks() -> tuple[Disk, ...]:
    folders = {"downloads": env.hub_cache(), "kept models": env.cache_dir()}
    return tuple(probe_system.disk(role, path) for role, path in folders.items())


def _hub() -> Hub:
    path = env.hub_cache()
    files, unfinished = probe_system.downloads(path)
    return Hub(path=str(path), files=files, unfinished=unfinished, offline=env.hub_offline())
