"""Runs pytest on another build of the kernels: `python other_build.py EXTENSION ARGUMENTS`."""

from __future__ import annotations

import importlib.util
import sys

import pytest


def use(extension: str) -> None:
    """Makes the extension at this path `halfbyte._cpu` in this process."""
    spec = importlib.util.spec_from_file_location("halfbyte._cpu", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["halfbyte._cpu"] = module


if __name__ == "__main__":
    use(sys.argv[1])
    sys.exit(pytest.main(sys.argv[2:]))
