"""Builds llama.cpp's server, which has the speculative loop that bench/peers.py compares with.

    python bench/build_peer.py [--source DIR]      # prints the path of llama-server

The source is the one that the installed llama-cpp-python was built from (its source distribution
holds it), so that both sides of every row are the same version. Needs cmake and a C++ compiler;
takes some minutes, once: what is built stays in the cache folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte import env

# Everything else stays as it is by default: this machine's instructions, OpenMP, repacked weights.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="llama.cpp's source, if it is here already")
    parser.add_argument("--jobs", type=int, default=env.processor_count())
    arguments = parser.parse_args()
    if not server().exists():
        source = arguments.source or downloaded(folder() / "source")
        build(source, arguments.jobs)
    print(server())


def folder() -> Path:
    """Where the build of the installed version is kept."""
    return env.cache_dir() / f"llama.cpp-{version('llama-cpp-python')}"


def server() -> Path:
    """The program, where it was built."""
    return folder() / "build" / "bin" / "llama-server"


def downloaded(target: Path) -> Path:
    """llama.cpp's source out of the source distribution of the installed llama-cpp-python."""
    found = target / "vendor" / "llama.cpp"
    if not found.exists():
        wanted = f"llama-cpp-python=={version('llama-cpp-python')}"
        with TemporaryDirectory() as temporary:
            options = ("--no-deps", "--no-binary", ":all:", "--dest", temporary)
            subprocess.run([sys.executable, "-m", "pip", "download", *options, wanted], check=True)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                inside = Path(archive.getnames()[0].partition("/")[0])
                archive.extractall(temporary, filter="data")
            target.parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / inside).rename(target)
    return found


def build(source: Path, jobs: int) -> None:
    """Configures and compiles the one program."""
    where = folder() / "build"
    options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
    subprocess.run(["cmake", "-S", source, "-B", where, *options], check=True)
    compile_ = ["cmake", "--build", where, "--target", "llama-server", "--parallel", str(jobs)]
    subprocess.run(compile_, check=True)


if __name__ == "__main__":
    main()
