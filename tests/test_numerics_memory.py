"""The memory beside the result is a few tiles, however large the tensor is."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import resource, sys
import numpy as np, torch
from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import convert, decode, encode
from halfbyte.specs import scheme_of

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
shape, bf16, target = (16384, 4096), scheme_of("bf16"), scheme_of("q4_0")
work, method = sys.argv[1], "search"
small = torch.randn(512, 4096).bfloat16()
convert(encode(small, bf16), target, method=method)  # what any size costs
weight = small.repeat(32, 1)
source = QTensor(bf16, shape, weight.view(torch.uint8).numpy())
before = peak()
if work == "encode":
    result = encode(weight, target, method=method).nbytes
elif work == "convert":
    result = convert(source, target, method=method).nbytes
else:
    result = decode(source).nbytes
print((peak() - before - result) / 2**20)
"""


@pytest.mark.parametrize(("work", "limit_mib"), [("encode", 16), ("convert", 48), ("decode", 16)])
def test_peak_is_the_result_and_a_few_tiles(work: str, limit_mib: int) -> None:
    """64 M weights would be 256 MiB in f32; they may cost little more than 2 M weights do.

    A tile of f32 is 4 MiB, a chunk of `convert` 32.
    """
    if sys.platform != "linux":
        pytest.skip("reads the peak of a process as Linux reports it")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, work], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < limit_mib
