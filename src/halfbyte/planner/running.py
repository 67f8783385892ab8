"""Which models are loaded on this machine now, and what each was planned to take.

A loaded model announces itself by a small file in the cache folder, named by its process; the file
goes when the model does. One that a killed process left behind is known by the process's start,
which no later process of that number shares, and is removed by whoever looks. Where the folder
cannot be written nothing is announced, and nothing else changes.
"""

from __future__ import annotations

import json
import os
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte import env
from halfbyte.planner.probe_system import process_start

FOLDER = "running"
LARGEST = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A loaded model. `started`: its process's, in ticks. `before_bytes`: what was resident before
    it was loaded, which no plan counts."""

    pid: int
    started: int
    model: str
    planned_bytes: int
    before_bytes: int


def announce(owner: object, model: str, *, planned_bytes: int, before_bytes: int) -> None:
    """Tells of a model for as long as `owner` lives, at most to the end of this process."""
    pid = os.getpid()
    it = Running(
        pid=pid,
        started=process_start(pid) or 0,
        model=model,
        planned_bytes=planned_bytes,
        before_bytes=before_bytes,
    )
    path = env.cache_dir() / FOLDER / f"{pid}-{id(owner):x}.json"
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(it)), encoding="utf-8")
        new.replace(path)
        weakref.finalize(owner, _withdraw, path, pid)


def _withdraw(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has a copy of the owner
        with suppress(OSError):
            path.unlink(missing_ok=True)


def running() -> list[Running]:
    """The models that are loaded, by process; what dead processes left behind is removed."""
    folder = env.cache_dir() / FOLDER
    found: list[Running] = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        it = _read(path)
        if it is not None and process_start(it.pid) == it.started:
            found.append(it)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return found


def _read(path: Path) -> Running | None:
    """What a file announces; None for one that is not of ours."""
    try:
        if path.stat().st_size > LARGEST:
            return None
        document = json.loads(path.read_text(encoding="utf-8"))
        return Running(
            pid=int(document["pid"]),
            started=int(document["started"]),
            model=str(document["model"]),
            planned_bytes=int(document["planned_bytes"]),
            before_bytes=int(document["before_bytes"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
