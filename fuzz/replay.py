"""Run the corpus of one target, without atheris: python fuzz/replay.py TARGET.

Holds each input to what run.py says of a target, and its memory to twice the input and an
allowance: the Python heap per input, and the growth of the process over all of them.
"""

from __future__ import annotations

import resource
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from halfbyte.errors import HalfbyteError

HERE = Path(__file__).parent
ALLOWANCE = 1 << 22
GROWTH = 1 << 27  # libraries allocate for themselves, out of Python's sight


def main(target: str) -> None:
    module = import_module(f"targets.{target}")
    allowance = getattr(module, "ALLOWANCE", ALLOWANCE)
    inputs = {path: path.read_bytes() for path in sorted((HERE / "corpus" / target).iterdir())}
    _peak(module.one_input, next(iter(inputs.values())))  # what is imported late is not counted
    before = _resident()
    for path, data in inputs.items():
        peak = _peak(module.one_input, data)
        assert peak <= 2 * len(data) + allowance, f"{path}: {peak} bytes for {len(data)}"
    growth = _resident() - before
    assert growth <= GROWTH, f"{target}: the process grew by {growth} bytes"
    print(f"{target}: {len(inputs)} inputs")


def _peak(one_input: Callable[[bytes], None], data: bytes) -> int:
    """The most bytes in use at once while it ran."""
    tracemalloc.start()
    with suppress(HalfbyteError):
        one_input(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
