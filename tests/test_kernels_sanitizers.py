"""The native tests once more, on other builds: with sanitizers, and for a processor not at hand.

Each test builds the kernels (minutes, into build/) and runs the native tests on them in a process
of their own. What the sanitizers' own runtimes cannot do stays out: forks beside threads, limits of
the address space.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.kernels.cpu import instruction_set
from halfbyte.kernels.cpu.ops import native

pytestmark = pytest.mark.sanitizers

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/test_kernels_{name}.py" for name in ("shapes", "pool", "extremes", "cpu")]
MODELS = ["tests/test_models_drafter.py", "tests/test_models_adapters.py"]
LIMITED = "not fork and not child and not without"
FLAGS = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=undefined -fsanitize="
PATIENCE = 3600


def output(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-10000:]
    return done.stdout


def built(name: str, *options: str) -> Path:
    """The folder of a build of the native kernels, up to date."""
    if not shutil.which("cmake") or not shutil.which("g++"):
        pytest.skip("needs cmake and g++")
    nanobind = pytest.importorskip("nanobind")
    folder = ROOT / "build" / name
    paths = (f"-Dnanobind_DIR={nanobind.cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    output("cmake", "-S", str(ROOT), "-B", str(folder), *paths, *options)
    output("cmake", "--build", str(folder), "--parallel", str(os.cpu_count()))
    return folder


def run_tests(folder: Path, *arguments: str, **environment: str) -> None:
    (extension,) = folder.glob("_cpu*.so")
    command = ["setarch", "--addr-no-randomize", sys.executable, "tests/other_build.py"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    output(
        *command,
        str(extension),
        *arguments,
        *("-p", "no:cacheprovider", "-s"),
        PYTHONPATH=path,
        **environment,
    )


def libraries(*names: str) -> str:
    """The runtimes, to be loaded first; the one of C++ before any sanitizer looks for it."""
    files = [output("g++", f"-print-file-name={name}").strip() for name in names]
    return " ".join([*files, output("g++", "-print-file-name=libstdc++.so.6").strip()])


def test_addresses_and_undefined_behaviour() -> None:
    flags = f"-DCMAKE_CXX_FLAGS={FLAGS}address,undefined"
    folder = built("address", "-DCMAKE_BUILD_TYPE=None", flags)
    run_tests(
        folder,
        *(*TESTS, *MODELS, "-k", LIMITED),
        LD_PRELOAD=libraries("libasan.so"),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's
        UBSAN_OPTIONS="print_stacktrace=1",
    )


def test_threads() -> None:
    folder = built("thread", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}thread")
    run_tests(
        folder,
        *(*TESTS, *MODELS, "-k", LIMITED),
        LD_PRELOAD=libraries("libtsan.so"),
        TSAN_OPTIONS="report_signal_unsafe=0",
    )


def test_avx_vnni_in_the_encoding_of_avx512() -> None:
    """The source and the arithmetic of AVX-VNNI; the encoding that it has there is not run."""
    if instruction_set() is None or not native().supports("avx512-vnni"):
        pytest.skip("needs a processor with AVX-512 VNNI")
    run_tests(built("evex", "-DHALFBYTE_EVEX_VNNI=ON"), *TESTS, "-k", "avx-vnni or avx_vnni")


@pytest.mark.parametrize(("name", "vnni"), [("avx2", False), ("avxvnni", True)])
def test_a_set_keeps_to_its_instructions(name: str, vnni: bool) -> None:
    """Nothing of AVX-512 is in the others, and no function that the linker could share out."""
    (file,) = (built("release") / "CMakeFiles/_cpu.dir/csrc").glob(f"kernels_{name}.cpp.o")
    code = output("objdump", "--disassemble", "--no-show-raw-insn", str(file))
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", code)
    assert ("{vex} vpdpbusd" in code) == vnni and "\tvpdpbusd" not in code
    weak = [line for line in output("nm", "--demangle", str(file)).splitlines() if " W " in line]
    assert weak and all(f" {name}::" in line for line in weak)
