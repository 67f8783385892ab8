"""A plan filled: what the process grew by is what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.kernels.cpu import instruction_set

native = pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")


def halfbyte(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "halfbyte", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@native
@pytest.mark.parametrize("kv", ["bf16", "q8_0"])
@pytest.mark.parametrize("sequences", ["1", "4"])
def test_the_demo_fills_as_planned(kv: str, sequences: str) -> None:
    done = halfbyte(
        "fill", "demo", "--kv", kv, "--sequences", sequences, "--no-calibration", "--json"
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = {row["part"]: row for row in document["rows"]}
    assert document["holds"]
    assert rows["kv"]["measured_bytes"] == pytest.approx(rows["kv"]["planned_bytes"], abs=2**20)


@native
def test_a_plan_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert halfbyte("plan", "demo", "--no-calibration", "--emit", str(path)).returncode == 0
    plan = json.loads(path.read_text())
    plan["rows"][0]["bytes"] += 2**28
    path.write_text(json.dumps(plan))
    done = halfbyte("fill", "demo", "--plan", str(path), "--no-calibration")
    assert done.returncode == 3
    assert "the plan is wrong by" in done.stderr


def test_what_does_not_fit_is_said_with_what_would() -> None:
    done = halfbyte("plan", "demo", "--budget", "16MiB")
    assert done.returncode == 3
    assert "do not fit into" in done.stderr
    assert "would hold it" in done.stderr
