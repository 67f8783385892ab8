"""`distill` killed while it does anything of what it does: started again, it ends in the same."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic, sleep

import pytest

STORY = "Once there was a girl named Lily who had a big red ball. One day it began to rain. "
LONGEST_S = 300.0


class Command:
    """A distillation in processes of its own, in a folder with a cache of its own."""

    def __init__(self, model: Path, folder: Path, *more: object) -> None:
        folder.mkdir()
        self._out, self._folder = folder / "out.gguf", folder
        data = folder / "stories.txt"
        data.write_text("".join(f"{n} {STORY}" for n in range(100)), encoding="utf-8")
        held = folder / "held.txt"
        held.write_text("Tim and his dog saw a big tree. " * 80, encoding="utf-8")
        self._words = [
            sys.executable, "-m", "halfbyte", "distill", model, "-o", self._out, "--data", data,
            "--held-out", held, "--own", "2k", "--batch", "2", "--window", "32",
            "--measure-every", "3", "--save-every", "0", "--threads", "1", *more,
        ]  # fmt: skip

    @property
    def work(self) -> Path:
        return self._folder / "out.gguf.work"

    @property
    def states(self) -> Path:
        return self._folder / "cache" / "states"

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "HALFBYTE_CACHE": str(self._folder / "cache")}
        return subprocess.Popen([*map(str, self._words)], env=environment, stderr=subprocess.PIPE)

    def finish(self) -> bytes:
        """The bytes of the result, in its place or refused one."""
        _, said = (running := self.start()).communicate(timeout=LONGEST_S)
        assert running.returncode in (0, 7), said.decode()
        refused = self.work / "new" / self._out.name
        assert self._out.exists() != refused.exists()
        return (self._out if self._out.exists() else refused).read_bytes()

    def kill(self, begun: Callable[[], bool], delay: float) -> bool:
        """Starts it, and kills it so long after something has begun; False if it ended before."""
        running, first = self.start(), monotonic()
        while not begun() and running.poll() is None and monotonic() - first < LONGEST_S:
            sleep(0.005)
        sleep(delay)
        alive = running.poll() is None
        running.kill()
        running.communicate()
        return alive


def stages(command: Command) -> dict[str, Callable[[], bool]]:
    """What a run does, in order, and how one sees that it has begun."""
    work = command.work
    return {
        "generating": (work / "own").is_dir,
        "quantizing": (work / "start").is_dir,
        "reading": lambda: any(command.states.glob("*")),
        "gathering": (work / "forms").is_dir,
        "training": (work / "run" / "state.npz").exists,
        "layers": (work / "layers" / "layers.0.npz").exists,
        "measuring": (work / "new").is_dir,
    }


def killed_in(command: Command, names: Sequence[str], each: int) -> list[str]:
    chance, found = random.Random(0), list[str]()
    for name in names:
        for _ in range(each):
            if command.kill(stages(command)[name], 0.3 * chance.random()):
                found.append(name)
    return found


def test_killed_while_it_quantizes_and_trains(stories260k: Path, tmp_path: Path) -> None:
    quick = ("--mode", "full", "--steps", "25")
    whole = Command(stories260k, tmp_path / "whole", *quick).finish()
    parts = Command(stories260k, tmp_path / "parts", *quick)
    names = ["quantizing", "gathering", "training"]
    assert killed_in(parts, names, 1) == names
    assert parts.finish() == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("full", ["generating", "quantizing", "reading", "gathering", "training", "measuring"]),
        ("lora", ["quantizing", "reading", "gathering", "training", "measuring"]),
        (
            "blockwise",
            ["generating", "quantizing", "gathering", "layers", "layers", "measuring"],
        ),
    ],
)
def test_killed_twice_in_all_it_does(
    stories260k: Path, tmp_path: Path, mode: str, names: list[str]
) -> None:
    more = ("--mode", mode, "--steps", "60")
    whole = Command(stories260k, tmp_path / "whole", *more).finish()
    parts = Command(stories260k, tmp_path / "parts", *more)
    found = killed_in(parts, names, 2)
    print("killed while it was", found)
    assert len(found) == 2 * len(names)
    assert parts.finish() == whole
