"""The readers of the machine, on files and answers of other machines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfbyte.env import control_groups
from halfbyte.planner import probe_card, probe_install, probe_system
from halfbyte.planner.doctor.facts import numbers

GIB = 2**30
FILES = {
    "proc/cpuinfo": (
        "processor\t: 0\nmodel name\t: AMD Ryzen 5 5600\nflags\t\t: fpu sse2 fma f16c avx2\n\n"
        "processor\t: 1\nmodel name\t: AMD Ryzen 5 5600\nflags\t\t: fpu sse2 fma f16c avx2\n"
    ),
    "proc/meminfo": (
        "MemTotal:       32768000 kB\nMemFree:         1000000 kB\nMemAvailable:   16384000 kB\n"
        "SwapTotal:       8192000 kB\nSwapFree:        4096000 kB\nHugePages_Total:       0\n"
    ),
    "proc/version": "Linux version 5.15.153.1-microsoft-standard-WSL2 (gcc 11.2.0)\n",
    "proc/modules": "nouveau 2625536 1 - Live 0x0\ndrm 741376 4 nouveau, Live 0x0\n",
    "proc/mounts": (
        "/dev/sdc / ext4 rw 0 0\nC:\\134 /mnt/c 9p rw 0 0\n"
        "nas:/m /mnt/big\\040disk nfs4 rw 0 0\nbroken\n"
    ),
    "proc/17/status": "Name:\thalfbyte\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n",
    "proc/17/comm": "halfbyte\n",
    "proc/17/stat": "17 (a) b (c) S 1 " + " ".join(map(str, range(5, 30))) + "\n",
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
    "sys/bus/pci/devices/0000:00:02.0/vendor": "0x8086\n",
    "sys/bus/pci/devices/0000:00:02.0/class": "0x030000\n",
}


def plant(root: Path, **more: str) -> Path:
    for name, text in {**FILES, **more}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def test_the_processor(tmp_path: Path) -> None:
    found = probe_system.processor(plant(tmp_path))
    assert found.name == "AMD Ryzen 5 5600" and found.present == 2
    assert found.flags >= {"avx2", "fma", "f16c"} and "avx512_vnni" not in found.flags


def test_memory_and_swap(tmp_path: Path) -> None:
    found = probe_system.memory(plant(tmp_path))
    assert (found.total, found.available) == (32768000 * 1024, 16384000 * 1024)
    assert (found.swap_total, found.swap_free) == (8192000 * 1024, 4096000 * 1024)
    assert found.limit is None


@pytest.mark.parametrize(
    ("groups", "files"),
    [
        (  # version 2: the group's own limit, and a looser one above
            "0::/pod/box\n",
            {
                "pod/memory.max": str(12 * GIB),
                "pod/box/memory.max": str(8 * GIB),
                "pod/box/memory.current": str(5 * GIB),
                "pod/box/memory.stat": f"anon 1\ninactive_file {GIB}\n",
                "memory.max": "max",
            },
        ),
        (  # version 1: no limit at the top is a huge number
            "4:memory:/box\n1:cpu:/\n0::/\n",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/box/memory.limit_in_bytes": str(8 * GIB),
                "memory/box/memory.usage_in_bytes": str(5 * GIB),
                "memory/box/memory.stat": f"inactive_file 3\ntotal_inactive_file {GIB}\n",
            },
        ),
    ],
)
def test_the_limit_of_a_container(tmp_path: Path, groups: str, files: dict[str, str]) -> None:
    under = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    root = plant(tmp_path, **{"proc/self/cgroup": groups}, **under)
    found = probe_system.memory(root)
    assert found.limit == 8 * GIB
    assert 3 * GIB < found.available <= 4 * GIB
    assert list(control_groups("memory", root))


def test_a_container_that_hides_everything(tmp_path: Path) -> None:
    assert probe_system.memory(tmp_path).total == 0
    assert probe_system.processor(tmp_path).present == 1
    assert probe_system.modules(tmp_path) == frozenset() and not probe_system.is_wsl(tmp_path)
    assert probe_system.nvidia_boards(tmp_path) == 0
    assert probe_system.process_memory(17, tmp_path) is None
    assert probe_system.process_start(17, tmp_path) is None


def test_modules_boards_and_windows(tmp_path: Path) -> None:
    root = plant(tmp_path)
    assert probe_system.modules(root) == {"nouveau", "drm"}
    assert probe_system.nvidia_boards(root) == 1  # its sound controller is none
    assert probe_system.is_wsl(root)
    assert not probe_system.is_wsl(plant(tmp_path / "b", **{"proc/version": "Linux 6.8 (gcc)"}))


def test_the_filesystem_of_a_path(tmp_path: Path) -> None:
    root = plant(tmp_path)
    assert probe_system.filesystem(Path("/home/jane"), root) == "ext4"
    assert probe_system.filesystem(Path("/mnt/c/Users"), root) == "9p"
    assert probe_system.filesystem(Path("/mnt/cache"), root) == "ext4"
    assert probe_system.filesystem(Path("/mnt/big disk/hf"), root) == "nfs4"


def test_processes(tmp_path: Path) -> None:
    root = plant(tmp_path)
    assert probe_system.process_memory(17, root) == (2**20, 2**21)
    assert probe_system.process_name(17, root) == "halfbyte"
    assert probe_system.process_start(17, root) == 22
    assert probe_system.processes_named("halfbyte", root) == [17]
    here = probe_system.process_memory(os.getpid())
    assert here is not None and 0 < here[0] <= here[1]
    assert (probe_system.process_start(os.getpid()) or 0) > 0


def test_the_registry(tmp_path: Path) -> None:
    line = "\r\n    HwSchMode    REG_DWORD    0x%d\r\n\r\n"
    assert probe_system.scheduling_of(line % 2) is True
    assert probe_system.scheduling_of(line % 1) is False
    assert probe_system.scheduling_of("ERROR: The system was unable to find") is None


def test_downloads_that_were_broken_off(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / ("0" * 64)).write_bytes(b"whole")
    (blobs / ("1" * 64 + ".part")).write_bytes(b"12345")
    (blobs / ("2" * 64 + ".incomplete")).write_bytes(b"1234567")
    assert probe_system.downloads(tmp_path) == (1, 12)
    assert probe_system.downloads(tmp_path / "none") == (0, 0)


def test_a_disk_that_is_not_there_yet(tmp_path: Path) -> None:
    found = probe_system.disk("kept models", tmp_path / "a" / "b")
    assert found.writable and found.free > 0 and found.path.endswith("a/b")


def test_torch_by_its_files() -> None:
    text = "__version__ = '2.13.0+cu128'\ndebug = False\ncuda: Optional[str] = '12.8'\nhip = None\n"
    pins = ["nvidia-cudnn-cu12==9.10.2.21; platform_system == 'Linux'", "numpy"]
    found = probe_install.described(text, pins)
    assert (found.version, found.cuda, found.cudnn) == ("2.13.0+cu128", "12.8", "9.10.2.21")
    plain = probe_install.described("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert (plain.version, plain.cuda, plain.cudnn) == ("2.13.0+cpu", None, None)


def test_requirements() -> None:
    lines = ["torch>=2.11", "jinja2 >=3.1.6", 'pytest>=8.3; extra == "dev"', "thing==1"]
    assert probe_install.least_releases(lines) == {"torch": "2.11", "jinja2": "3.1.6"}
    assert {"torch", "numpy", "click"} <= probe_install.requirements().keys()
    assert probe_install.packages(["numpy", "no-such-thing"])["no-such-thing"] is None


@pytest.mark.parametrize(
    ("release", "expected"),
    [("2.13.0+cpu", (2, 13, 0)), ("3.14.0rc1", (3, 14, 0)), ("13.615.71", (13, 615, 71)), ("", ())],
)
def test_releases_are_compared_as_numbers(release: str, expected: tuple[int, ...]) -> None:
    assert numbers(release) == expected


def test_libraries_before_those_of_torch(tmp_path: Path) -> None:
    (tmp_path / "libcudnn.so.8.9.7").touch()
    (tmp_path / "libcudnn.so.8").symlink_to("libcudnn.so.8.9.7")
    (tmp_path / "libcudnn.so").symlink_to("libcudnn.so.8")
    found = probe_install.cudnn_files([tmp_path, tmp_path / "none"])
    assert found == {str(tmp_path / "libcudnn.so"): "8.9.7"}


@pytest.fixture(scope="session")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The stand-in for the driver's library, built here."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the stand-in for NVML with")
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return str(library)


def test_cards_through_the_drivers_own_interface(
    nvml: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML_PID", str(os.getpid()))
    found = probe_card.read((nvml,))
    assert found.driver is not None and found.refusal is None
    assert (found.driver.version, found.driver.cuda) == ("570.133.07", (12, 8))
    (card,) = found.cards
    assert (card.name, card.memory, card.used) == ("NVIDIA GeForce RTX 3060", 12 * GIB, 2 * GIB)
    assert (card.capability, card.lanes, card.lanes_possible) == ((8, 6), 8, 16)
    assert [(it.pid, it.bytes, it.ours) for it in card.processes] == [
        (os.getpid(), 3 * GIB, True),
        (4194303, GIB, False),
        (4194302, None, False),
    ]
    assert probe_card.card_bytes(os.getpid(), found.cards) == 3 * GIB
    assert probe_card.card_bytes(4194302, found.cards) is None
    assert probe_card.card_bytes(1, found.cards) == 0


def test_a_driver_that_refuses(nvml: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML_BROKEN", "1")
    found = probe_card.read((nvml,))
    assert found.refusal == "Driver/library version mismatch" and found.cards == ()
    assert probe_card.read(("libno-such-library.so",)) == probe_card.Reading()


def test_the_machine_is_examined_without_torch_and_without_compiled_code(tmp_path: Path) -> None:
    """Nor numpy, click's neighbours or any other room that a broken installation may lack."""
    code = """
import sys
for name in ("torch", "numpy", "tokenizers", "halfbyte._cpu"):
    sys.modules[name] = None
from halfbyte.planner.doctor.finding import examine
from halfbyte.planner.doctor.machine import CHECKS, machine_facts
found = examine(machine_facts(), CHECKS)
print([it.finding for it in found if it.name == "native-kernels"])
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference op set" in done.stdout
    assert time.monotonic() - began < 60
