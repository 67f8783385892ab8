"""A program that nobody has read, run in a process of its own with little to work with.

Seconds of processor time, memory, size of files and open files are limited; the environment is
empty, the folder is a fresh one, and nothing that it prints is seen. It is NOT a sandbox: the
program has the rights of this user, the disk and the network among them. Whoever runs it says so
first, and does well to do it in a container.
"""

from __future__ import annotations

import subprocess
import sys
from tempfile import TemporaryDirectory

PASSED = b"passed"
# The limits are set and stdout is put away before the program is read; only its end is told.
START = """
import os, resource, sys
limits = {"CPU": int(sys.argv[1]), "AS": 1 << 30, "FSIZE": 1 << 20, "NOFILE": 32, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
told = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
exec(compile(sys.stdin.read(), "answer", "exec"), {"__name__": "__main__"})
os.write(told, b"passed")
"""


def passes(program: str, *, seconds: int = 10) -> bool:
    """Whether a program comes to its end within `seconds`, without an exception or an exit."""
    command = [sys.executable, "-I", "-S", "-c", START, str(seconds)]
    with TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                command,
                input=program.encode(errors="replace"),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=2 * seconds,
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout == PASSED
