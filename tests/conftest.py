"""Shared fixtures. Tests that need the shared data skip with a clear reason when it is absent."""

from __future__ import annotations

import os
from pathlib import Path

# Small models gain nothing from threads, and threads that wait for each other spin: on a busy
# machine that is the difference between minutes and hours. Must be set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads this when it is imported, by whomever: where there is no card, its kernels run in the
# interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from commandline import Halfbyte, runner

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs the shared test data: {path} is absent")
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts, tokenizers and golden files (see its INDEX.md)."""
    return _shared("data")


@pytest.fixture(scope="session")
def tiny_gemma4() -> Path:
    """A trained 8 M parameter checkpoint with the 12B's architecture."""
    return _shared("models", "tiny-gemma4")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real Llama of 260 thousand parameters; its FFN width is 172."""
    return _shared("models", "stories260K")


@pytest.fixture
def halfbyte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Halfbyte:
    """Runs a command line in this process, with a cache folder of its own."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return runner(monkeypatch, capsys)
