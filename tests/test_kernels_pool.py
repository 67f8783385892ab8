"""The thread pool in company: forks, signals, several callers, the end of a process, its size."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from native_steps import Product, random_weight, rows_of

from halfbyte import env
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.cpu.ops import native

if instruction_set() is None:
    pytest.skip(
        "the native kernels are not built, or not for this machine", allow_module_level=True
    )

PATIENCE = 120  # seconds until something is said to hang
SETUP = """
import os, resource, signal, sys, threading, time
import numpy as np
from halfbyte.kernels.cpu import CPUOps
from native_steps import Product, random_weight
product = lambda ops, rows=3: Product(
    ops, random_weight("q4_0", 640, 512), np.ones((rows, 512), np.float32))
"""


def outcome(script: str) -> str:
    """What a Python process of its own prints; it must end well, and in time."""
    path = os.pathsep.join(sys.path)
    same_build = f"import other_build; other_build.use({native().__file__!r})"
    done = subprocess.run(
        [sys.executable, "-c", same_build + SETUP + script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def product(ops: CPUOps, seed: int = 0, rows: int = 3) -> Product:
    x = np.random.default_rng(seed).standard_normal((rows, 512), dtype=np.float32)
    return Product(ops, random_weight("q4_0", 640, 512, seed), x)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("threads", range(1, 9))
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    one = product(CPUOps(threads=1))()
    several = product(CPUOps(threads=threads))
    assert all(np.array_equal(several(), one) for _ in range(20))


def test_many_programs_share_a_pool() -> None:
    ops = CPUOps(threads=2)
    products = [product(ops, seed) for seed in range(12)]
    alone = [product(CPUOps(threads=1), seed)() for seed in range(12)]
    for _ in range(5):
        assert all(np.array_equal(p(), a) for p, a in zip(products, alone, strict=True))


def test_threads_of_python_take_turns() -> None:
    ops = CPUOps(threads=3)
    products = [product(ops, seed) for seed in range(4)]
    expected = [p() for p in products]
    wrong: list[int] = []

    def work(index: int) -> None:
        if not all(np.array_equal(products[index](), expected[index]) for _ in range(200)):
            wrong.append(index)

    workers = [in_thread(lambda index=index: work(index)) for index in range(4)]
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a thread hangs"
    assert wrong == []


def test_packing_beside_a_running_step() -> None:
    ops = CPUOps(threads=2)
    step, weight = product(ops), random_weight("q6_k", 640, 512)
    expected = step()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            assert np.array_equal(step(), expected)

    worker = in_thread(work)
    for _ in range(50):
        assert np.array_equal(ops.unpack(ops.pack(weight)).data, weight.data)
    stop.set()
    worker.join(PATIENCE)
    assert not worker.is_alive()


def test_a_program_that_runs_refuses_a_second_caller() -> None:
    step = product(CPUOps(threads=2), rows=512)
    expected = step()
    refused, over = threading.Event(), threading.Event()

    def work() -> None:
        while not refused.is_set() and not over.is_set():
            try:
                step()
            except RuntimeError as error:
                assert "already running" in str(error)
                refused.set()

    workers = [in_thread(work) for _ in range(2)]
    assert refused.wait(PATIENCE)
    over.set()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive()
    assert np.array_equal(step(), expected)


def test_results_outlive_a_longer_run() -> None:
    step = product(CPUOps(threads=2), rows=3000).step
    (first,) = step(rows_of([0]), [0])
    kept = first.copy()
    step(rows_of(range(3000)), range(3000))  # needs more memory than there was
    assert np.array_equal(first, kept)


FORKS = """
ops = CPUOps(threads=2)
step = product(ops)
expected = step()
def child():
    own = product(CPUOps(threads=2))
    good = np.array_equal(step(), expected) and np.array_equal(own(), expected)
    os._exit(0 if good else 1)
def ends_well(pid):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False
"""


def test_a_child_starts_threads_of_its_own() -> None:
    script = """
for _ in range(10):
    pid = os.fork() or child()
    assert ends_well(pid), "in the child"
    assert np.array_equal(step(), expected)
print("good")
"""
    assert outcome(FORKS + script) == "good"


def test_a_fork_in_the_middle_of_a_step() -> None:
    script = """
stop = threading.Event()
other = product(ops, 64)
def work():
    while not stop.is_set():
        other()
worker = threading.Thread(target=work)
worker.start()
for _ in range(30):
    pid = os.fork() or child()
    assert ends_well(pid), "in the child"
stop.set()
worker.join()
assert np.array_equal(step(), expected)
print("good")
"""
    assert outcome(FORKS + script) == "good"


def test_an_interrupt_arrives_after_the_step() -> None:
    script = """
step = product(CPUOps(threads=2), 512)
expected = result = step()
steps = 0
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while steps < 100000:
        result = step()
        steps += 1
except KeyboardInterrupt:
    assert np.array_equal(result, expected) and np.array_equal(step(), expected)
    print("interrupted")
"""
    assert outcome(script) == "interrupted"


def test_threads_of_the_pool_take_no_signals() -> None:
    script = """
step = product(CPUOps(threads=3))
for task in os.listdir("/proc/self/task"):
    status = dict(l.split(":\\t") for l in open(f"/proc/self/task/{task}/status"))
    blocked = int(status["SigBlk"], 16)
    print(task == str(os.getpid()), bool(blocked >> (signal.SIGINT - 1) & 1))
"""
    lines = outcome(script).splitlines()
    assert len(lines) >= 3 and lines.count("True False") == 1
    assert set(lines) == {"True False", "False True"}


def test_a_process_ends_with_live_pools() -> None:
    script = """
class Cycle: pass
kept = Cycle()
kept.self, kept.step, kept.ops = kept, product(CPUOps(threads=4)), CPUOps(threads=8)
kept.step()
step = product(CPUOps(threads=2))
step()
print("good")
"""
    assert outcome(script) == "good"


def test_a_system_without_threads_is_named_and_tried_again() -> None:
    script = """
ops = CPUOps(threads=64)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limit[1]))
try:
    product(ops)
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, limit)
assert np.array_equal(product(ops)(), product(CPUOps(threads=1))())
"""
    assert "no more threads" in outcome(script)


def test_the_number_of_threads_is_checked() -> None:
    for threads in (-1, 0, 1025):
        with pytest.raises(ValueError, match="1 to 1024"):
            native().Pool(threads)


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A fake /proc and /sys."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "count"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "3200000 100000\n"}, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"cpu.max": "500000 100000\n"}, 5),
        ("0::/a\n", {"b/cpu.max": "200000 100000\n"}, 8),
        ("4:cpu,cpuacct:/d\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, 8),
        (
            "9:memory:/m\n4:cpu,cpuacct:/d\n0::/\n",
            {"cpu/d/cpu.cfs_quota_us": "400000\n", "cpu/d/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            "4:cpu:/of/the/host\n",
            {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            3,
        ),
    ],
)
def test_a_container_limits_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    assert env.processor_count(system(tmp_path, groups, files)) == count


def test_affinity_limits_the_threads() -> None:
    script = """
from halfbyte import env
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(env.processor_count())
"""
    assert outcome(script) == "1"
