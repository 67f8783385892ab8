"""QTensor: what it accepts, its row views, and that it needs no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import decode
from halfbyte.specs import SCHEMES, scheme_of


def _tensor(name: str, *shape: int) -> QTensor:
    scheme = scheme_of(name)
    rows = int(np.prod(shape[:-1]))
    data = np.random.default_rng(1).integers(0, 64, (rows, scheme.row_bytes(shape[-1])), np.uint8)
    return QTensor(scheme, shape, data)


def test_sizes() -> None:
    q = _tensor("q4_0", 3, 5, 64)
    assert (q.num_rows, q.width, q.nbytes) == (15, 64, 15 * 36)
    assert q.blocks.shape == (30, 18) and np.shares_memory(q.blocks, q.data)
    assert _tensor("f32", 7).num_rows == 1


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ((2, 64), np.zeros((2, 35), np.uint8)),
        ((2, 64), np.zeros((3, 36), np.uint8)),
        ((2, 64), np.zeros(72, np.uint8)),
        ((2, 64), np.zeros((2, 36), np.int8)),
        ((2, 64), np.zeros((36, 2), np.uint8).T),
        ((2, 64), np.zeros((2, 72), np.uint8)[:, ::2]),
        ((2, 48), np.zeros((2, 27), np.uint8)),
        ((2, 0), np.zeros((2, 0), np.uint8)),
        ((-1, 32), np.zeros((1, 18), np.uint8)),
        ((), np.zeros((1, 18), np.uint8)),
    ],
)
def test_bytes_that_do_not_fit_the_shape_are_refused(
    shape: tuple[int, ...], data: np.ndarray
) -> None:
    with pytest.raises(IntegrityError):
        QTensor(scheme_of("q4_0"), shape, data)


def test_rows_are_a_view_of_the_same_bytes() -> None:
    q = _tensor("q6_k", 2, 3, 256)
    part = q.rows(1, 5)
    assert part.shape == (4, 256) and np.shares_memory(part.data, q.data)
    assert torch.equal(decode(part), decode(q).view(6, 256)[1:5])
    assert q.rows(6, 6).num_rows == 0


@pytest.mark.parametrize("name", SCHEMES)
def test_taking_rows_is_exact_in_every_scheme(name: str) -> None:
    q = _tensor(name, 6, 512)
    order = np.array([3, 0, 5, 1, 2, 4])
    taken = q.take_rows(order)
    assert taken.shape == (6, 512) and not np.shares_memory(taken.data, q.data)
    ours, expected = decode(taken), decode(q)[torch.from_numpy(order)]
    assert torch.equal(ours.view(torch.int32), expected.view(torch.int32))
    np.testing.assert_array_equal(taken.take_rows(np.argsort(order)).data, q.data)
    assert q.take_rows(np.array([5, 5])).shape == (2, 512)
    assert q.take_rows(np.array([], np.int64)).shape == (0, 512)


def test_rows_that_do_not_exist_are_refused() -> None:
    q = _tensor("q8_0", 4, 32)
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(InvalidInputError):
            q.rows(start, stop)
    for order in ([0, 4], [-1], [[0, 1]], [0.0, 1.0], [True]):
        with pytest.raises(InvalidInputError):
            q.take_rows(np.array(order))


def test_the_package_itself_imports_no_torch() -> None:
    code = "import sys, halfbyte.numerics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
