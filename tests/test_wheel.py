"""What is installed is what is here: every file of the package is in the wheel, the page's too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from scikit_build_core.build import build_wheel
build_wheel(sys.argv[1], {"wheel.cmake": "false"})
"""


def test_every_file_of_the_package_is_in_the_wheel(tmp_path: Path):
    """Built without the kernels, which come from csrc/ and not from here."""
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("halfbyte/")}
        page = archive.read("halfbyte/serve/page/index.html")
    source = ROOT / "src"
    here = {
        str(path.relative_to(source))
        for path in (source / "halfbyte").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert here - packed == set() and packed - here == set()
    assert {"halfbyte/serve/page/style.css", "halfbyte/serve/page/main.js"} < packed
    assert page == (source / "halfbyte" / "serve" / "page" / "index.html").read_bytes()
