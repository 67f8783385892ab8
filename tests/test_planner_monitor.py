"""What processes take: samples, the monitor of one's own, and who announces a model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from mmap import mmap
from pathlib import Path

import pytest

import halfbyte
from halfbyte.errors import InvalidInputError
from halfbyte.planner.monitor import COLUMNS, Monitor, sample
from halfbyte.planner.running import FOLDER, announce, running

MIB = 2**20


class Owner:
    """Something that lives and dies."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path


def test_a_monitor_sees_what_this_process_takes(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    with halfbyte.Monitor(interval=0.01, csv=path) as monitor:
        before = sample().resident_bytes
        with mmap(-1, 96 * MIB) as fresh:  # an array might lie where another one was
            fresh.write(b"1" * (96 * MIB))
            assert sample().resident_bytes > before + 64 * MIB
    summary = monitor.summary()
    assert summary.samples >= 1 and summary.peak_bytes >= before + 64 * MIB
    assert summary.card_peak_bytes == 0 and summary.seconds > 0
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == list(COLUMNS) and len(rows) == summary.samples + 1
    assert {row[COLUMNS.index("pid")] for row in rows[1:]} == {str(os.getpid())}


def test_a_peak_between_two_looks_is_seen() -> None:
    """The interval is longer than the test; the kernel remembers the peak, if it is a new one."""
    code = """
import numpy as np, halfbyte
with halfbyte.Monitor(interval=60) as monitor:
    np.ones(200 * 2**20, np.uint8)
print(monitor.summary().peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200 * MIB


def test_what_goes_wrong_in_the_thread_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(interval=0.01, csv=tmp_path / "memory.csv")

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("halfbyte.planner.monitor.Table.add", full)
    monitor.start()
    with pytest.raises(OSError, match="no space"):
        monitor.stop()
    with pytest.raises(InvalidInputError, match="interval"):
        Monitor(interval=0)
    with pytest.raises(InvalidInputError, match="no process"):
        sample(2**22 - 1)


def test_a_model_is_announced_as_long_as_it_lives(cache: Path) -> None:
    owner = Owner()
    announce(owner, "a model", planned_bytes=123, before_bytes=45)
    (found,) = running()
    assert (found.pid, found.model, found.planned_bytes) == (os.getpid(), "a model", 123)
    assert sample().planned_bytes == 123 and sample().name == "a model"
    del owner
    gc.collect()
    assert running() == [] and list((cache / FOLDER).iterdir()) == []


def test_what_dead_processes_left_is_removed(cache: Path) -> None:
    folder = cache / FOLDER
    folder.mkdir()
    stale = {"pid": os.getpid(), "started": 1, "model": "x", "planned_bytes": 1, "before_bytes": 0}
    texts = {
        "1-a.json": json.dumps(stale),
        "2-b.json": json.dumps({**stale, "pid": 2**22 - 1}),
        "3-c.json": "{",
        "4-d.json": json.dumps({"pid": "seven"}),
        "5-e.json": "[]",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert running() == [] and list(folder.iterdir()) == []


def test_a_process_that_is_killed_leaves_nothing_that_counts(cache: Path) -> None:
    code = """
import os, signal
from halfbyte.planner.running import announce
class Owner: pass
owner = Owner()
announce(owner, "killed", planned_bytes=1, before_bytes=0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list((cache / FOLDER).iterdir())) == 1
    assert running() == [] and list((cache / FOLDER).iterdir()) == []


def test_a_forked_child_takes_nothing_back(cache: Path) -> None:
    owner = Owner()
    announce(owner, "ours", planned_bytes=1, before_bytes=0)
    child = os.fork()
    if child == 0:
        del owner
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert [it.model for it in running()] == ["ours"]


def test_a_cache_that_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    announce(Owner(), "a model", planned_bytes=1, before_bytes=0)
    assert running() == []
