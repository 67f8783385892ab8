"""Whole jobs in processes of their own: killed at random, and in models of any depth."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from oracle import LLAMA, oracle

SOURCE = Path(__file__).parents[1] / "src"
PEAK = """
import sys, tempfile, threading, time, torch
from pathlib import Path
from halfbyte.formats.checkpoint import read
from halfbyte.quantizer.calibrate import Calibration, Sampling
from halfbyte.quantizer.calibrated import quantized
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.stages import Stages
from halfbyte.specs import recipe_of

# Memory of its own: pages of the mapped checkpoint come and go as the system likes.
sizes = [0]

def watch():
    while True:
        status = Path("/proc/self/status").read_text()
        sizes.append(int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.002)

source = read(Path(sys.argv[1]))
recipe = recipe_of("q4_0-pure")
schemes = {t.name: recipe.scheme_for(t.name, t.shape) for t in source.spec.tensors()}
windows = torch.randint(0, 128, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
calibration = Calibration(windows=windows, files={}, sampling=Sampling(samples=8, window=64))
with tempfile.TemporaryDirectory() as folder:
    stages = Stages(Path(folder) / "work", spec=source.spec, schemes=schemes, job={})
    asked = Quantization(
        source=source, schemes=schemes, method="gptq", calibration=calibration, stages=stages
    )
    threading.Thread(target=watch, daemon=True).start()
    quantized(asked)
print(max(sizes))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def peak_kib(model: Path) -> int:
    command = [sys.executable, "-c", PEAK, str(model)]
    done = subprocess.run(command, env=environment(), capture_output=True, check=True, timeout=300)
    return int(done.stdout)


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Eight more layers are 34 MB in f32, and 17 MB of the mapped file."""
    peaks: list[int] = []
    for depth in (2, 10):
        path = tmp_path / str(depth)
        wide = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": depth}
        oracle({**LLAMA, **wide}).bfloat16().save_pretrained(path)
        peaks.append(peak_kib(path))
    assert peaks[1] - peaks[0] < 24 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "yaqa"])
def test_ten_kills_end_in_the_same_bytes(
    method: str, stories260k: Path, shared_data: Path, tmp_path: Path
) -> None:
    text = shared_data / "calibration" / "c4.utf8"

    def start(target: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "halfbyte", "quantize", stories260k, "-o", target]
        command += ["--method", method, "--calib", text, "--samples", "24", "--window", "256"]
        command += ["--threads", "1"]
        return subprocess.Popen(
            [str(part) for part in command], env=environment(), stderr=subprocess.DEVNULL
        )

    began = time.monotonic()
    assert start(tmp_path / "whole.gguf").wait(300) == 0
    lasted = time.monotonic() - began
    whole = (tmp_path / "whole.gguf").read_bytes()

    target, chance, kills, resumed = tmp_path / "killed.gguf", random.Random(0), 0, 0
    while kills < 10:
        resumed += target.with_name("killed.gguf.work").exists()
        process = start(target)
        try:
            assert process.wait(chance.uniform(0.3, 0.9) * lasted) == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert target.read_bytes() == whole
        target.unlink()
    assert start(target).wait(300) == 0
    assert target.read_bytes() == whole
    assert resumed >= 4
    assert sorted(path.name for path in tmp_path.iterdir() if "killed" in path.name) == [
        "killed.gguf",
        "killed.gguf.manifest.json",
    ]
