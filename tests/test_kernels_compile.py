"""The kernels compile for cards that are not here, and fit on their chips.

In processes of their own: the tests of this one may run the interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import SHARED

TOOL = Path(__file__).resolve().parents[1] / "bench" / "compile_kernels.py"


def compiled(capability: int, *options: str, model: str = "gemma4-12b") -> list[tuple[str, int]]:
    """Kernels of a model in Q4_0, and the shared memory of each."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, TOOL, model, "--capability", str(capability / 10), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    return [(row[0], int(row[-1])) for row in rows]


@pytest.mark.parametrize("capability", [75, pytest.param(120, marks=pytest.mark.slow)])
def test_a_kernel_compiles_for_old_and_new_cards(capability: int) -> None:
    found = compiled(capability, "--only", "gated", "--rows", "1", model="llama-3.2-1b")
    assert [name for name, _ in found] == ["gated"]
    assert all(shared <= SHARED[capability] for _, shared in found)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    found = compiled(capability, "--rows", "1,8,512")
    assert {"product", "gated", "attended", "turned", "joined"} <= {name for name, _ in found}
    assert [row for row in found if row[1] > SHARED[capability]] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--kv", "q8_0"), ("--recipe", "q8_0"), ("--recipe", "bf16")])
def test_other_schemes_and_caches_compile(options: tuple[str, str]) -> None:
    found = compiled(86, "--rows", "1,512", *options)
    assert [row for row in found if row[1] > SHARED[86]] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["q4_k", "q5_k", "uint4-g128"])
def test_what_others_quantized_compiles(scheme: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[rules]\n"*" = "{scheme}"\n', encoding="utf-8")
    only = ("--only", "embedded,gated,product")
    found = compiled(86, "--rows", "1,512", "--recipe", str(recipe), *only, model="llama-3.2-1b")
    assert {name for name, _ in found} == {"embedded", "gated", "product"}
    assert [row for row in found if row[1] > SHARED[86]] == []
