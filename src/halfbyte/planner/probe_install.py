"""What is installed, found without importing any of it: packages, PyTorch, kernels, a compiler.

Importing PyTorch takes a second and 200 MB, and where the installation is broken it fails; so its
release is read from its files, and it is started only where a card makes its answer matter, in a
process of its own.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path

from halfbyte import env
from halfbyte.planner.doctor.facts import Native, Torch
from halfbyte.planner.doctor.installation import NEEDS
from halfbyte.planner.probe_system import read_text

CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
COMPILERS = ("c++", "g++", "clang++")
PATIENCE_S = 120
QUESTION = """
import json, torch
try:
    torch.zeros(1, device="cuda")
    refusal = None
except Exception as error:
    refusal = str(error).partition("\\n")[0]
print(json.dumps({"architectures": torch.cuda.get_arch_list(), "refusal": refusal}))
"""


def packages(names: Iterable[str]) -> dict[str, str | None]:
    """The installed release of each package, None for one that is absent."""
    return {name: _release(name) for name in names}


def _release(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, str]:
    """The least release of each package that halfbyte needs, as its own metadata says."""
    try:
        lines = metadata.requires("halfbyte") or []
    except metadata.PackageNotFoundError:
        return {}
    return least_releases(lines)


def least_releases(lines: Iterable[str]) -> dict[str, str]:
    """Name -> least release, of requirement lines that are no extras."""
    found = (
        re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in lines if "extra ==" not in line
    )
    return {match[1]: match[2] for match in found if match is not None}


def torch(*, ask: bool) -> Torch | None:
    """The installed PyTorch, None without one. `ask`: start it, too, and have it use the card."""
    try:
        spec = util.find_spec("torch")
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        return None
    facts = described(read_text(Path(spec.origin).with_name("version.py")), _pins())
    if not ask or facts.cuda is None:
        return facts
    answer = _asked()
    architectures = answer.get("architectures")
    refusal = answer.get("refusal")
    return Torch(
        version=facts.version,
        cuda=facts.cuda,
        cudnn=facts.cudnn,
        architectures=tuple(architectures) if isinstance(architectures, list) else None,
        refusal=None if refusal is None else str(refusal),
    )


def described(text: str, pins: Sequence[str] = ()) -> Torch:
    """A PyTorch by its version.py and the requirements in its metadata."""
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda\b[^=]*= '([^']+)'", text, re.MULTILINE)
    cudnn = (re.match(r"nvidia-cudnn[\w-]*==([\d.]+)", line) for line in pins)
    return Torch(
        version=version[1] if version else "of unknown release",
        cuda=cuda[1] if cuda else None,
        cudnn=next((match[1] for match in cudnn if match is not None), None),
    )


def _pins() -> Sequence[str]:
    try:
        return metadata.requires("torch") or ()
    except metadata.PackageNotFoundError:
        return ()


def _asked() -> Mapping[str, object]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", QUESTION],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if done.returncode:
            return {"refusal": (done.stderr.strip().splitlines() or ["it ended at once"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        return {"refusal": f"it could not be asked: {error}"}


def native() -> Native:
    """The compiled kernels of halfbyte, without anything else of it."""
    try:
        module = importlib.import_module("halfbyte._cpu")
    except ModuleNotFoundError:
        return Native(refusal="they were not built")
    except ImportError as error:
        return Native(refusal=f"they do not load ({error})")
    return Native(refusal=None, runs=tuple(name for name in NEEDS if module.supports(name)))


def bandwidth() -> float | None:
    """Bytes per second that all threads together read from memory, measured now."""
    try:
        from halfbyte.kernels.cpu import CPUOps
    except ImportError:
        return None
    return CPUOps(threads=env.thread_count() or env.processor_count()).read_bandwidth()


def compiler() -> tuple[str | None, bool]:
    """The C++ compiler as it calls itself, None without one; whether Python's headers are here."""
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return None if found is None else _first_line(found), headers.exists()


def _first_line(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return Path(program).name
    return next(iter(done.stdout.splitlines()), Path(program).name)


def cudnn_files(folders: Iterable[Path]) -> dict[str, str]:
    """Path -> release of the cuDNN libraries in folders that are searched before PyTorch's."""
    found: dict[str, str] = {}
    for folder in folders:
        for file in sorted(folder.glob("libcudnn.so*")) if folder.is_dir() else ():
            release = re.search(r"\.so\.(\d+\.\d+[\d.]*)$", file.resolve().name)
            if release is not None and str(folder) not in {str(Path(it).parent) for it in found}:
                found[str(file)] = release[1]
    return found
