"""The corpus of the fuzzers, replayed: no crash, no hang, no memory without a reason.

In a process of its own, so that an abort is seen, a hang is ended, and memory can be measured. The
time limit is a guard for a busy machine, not a measurement.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
TARGETS = sorted(path.stem for path in (FUZZ / "targets").glob("[!_]*.py"))
HANG_S = 120


def replayed(target: str, fuzz: Path = FUZZ) -> subprocess.CompletedProcess[str]:
    paths = [str(FUZZ.parent / "src"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(fuzz / "replay.py"), target],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_of(target: str) -> None:
    found = replayed(target)
    assert found.returncode == 0, found.stdout + found.stderr
    number = len(list((FUZZ / "corpus" / target).iterdir()))
    assert found.stdout == f"{target}: {number} inputs\n" and number > 1


def test_seeds_are_still_good_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They pass, so what is found near them lies behind the first check."""
    monkeypatch.syspath_prepend(str(FUZZ))
    from targets import (
        chat_template,
        gguf_reader,
        packed_reader,
        safetensors_reader,
        tokenizer_metadata,
    )

    for target, names in (
        (gguf_reader, ("llama-q4_0.gguf", "qwen2-q8_0.gguf")),
        (safetensors_reader, ("floats", "others")),
        (packed_reader, ("gptq", "gptq-sorted", "awq", "compressed", "int8", "nf4", "nf4-single")),
        (tokenizer_metadata, ("llama", "gpt2", "gemma4")),
        (chat_template, ("chatml", "tools", "macros", "generation")),
    ):
        for name in names:
            folder = target.__name__.removeprefix("targets.")
            target.one_input((FUZZ / "corpus" / folder / name).read_bytes())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise KeyError('x')", "KeyError"),
        ("bytearray(2**23)", "bytes for"),
        ("import os; os.abort()", ""),
    ],
)
def test_a_fault_is_seen(fault: str, message: str, tmp_path: Path) -> None:
    for name in ("replay.py", "targets/x.py", "corpus/x/seed"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "replay.py").write_text((FUZZ / "replay.py").read_text())
    (tmp_path / "targets" / "x.py").write_text(f"def one_input(data):\n    {fault}\n")
    (tmp_path / "corpus" / "x" / "seed").write_text("data")
    found = replayed("x", tmp_path)
    assert found.returncode != 0 and message in found.stderr


def test_the_corpus_is_small() -> None:
    assert sum(path.stat().st_size for path in (FUZZ / "corpus").rglob("*")) < 200_000
