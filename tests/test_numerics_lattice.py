"""Q4_0 lattices: found in floats of any type, brought back without a change, and never invented."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.lattice import Counts, is_lattice, recover
from halfbyte.numerics.scales import signed_extremum
from halfbyte.specs import SCHEMES

Q4_0 = SCHEMES["q4_0"]
ROWS, WIDTH = 96, 2048
BLOCKS = ROWS * WIDTH // 32


def _weights(seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_t(5, (ROWS, WIDTH)) / 50
    return torch.from_numpy(values.astype(np.float32))


def _on_grid(scale: Tensor, low: int, high: int) -> Tensor:
    blocks = _weights().view(-1, 32)
    return (scale * (blocks / scale).round_().clamp_(low, high)).view(ROWS, WIDTH)


def _extremum() -> Tensor:
    return signed_extremum(_weights().view(-1, 32))


def _largest() -> Tensor:
    return _extremum().abs()


RULES: dict[str, Callable[[], Tensor]] = {
    "max/-8": lambda: decode(encode(_weights(), Q4_0, method="rtn")),
    "searched": lambda: decode(encode(_weights(), Q4_0, method="search")),
    "+-7": lambda: _on_grid((_largest() / 7).half().float(), -7, 7),
    "max/-8 in bf16": lambda: _on_grid((_extremum() / -8).bfloat16().float(), -8, 7),
    "+-7 in bf16": lambda: _on_grid((_largest() / 7).bfloat16().float(), -7, 7),
}


@pytest.mark.parametrize("stored_as", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("rule", RULES)
def test_a_lattice_is_found(rule: str, stored_as: str) -> None:
    lattice = RULES[rule]()
    stored = encode(lattice, SCHEMES[stored_as])
    assert is_lattice(stored)
    found, counts = recover(stored)
    assert counts == Counts(exact=BLOCKS)
    weights = decode(found)
    again = decode(encode(weights, SCHEMES[stored_as]))
    assert torch.equal(again, decode(stored)), "every stored number comes back"
    if stored_as == "bf16" and not rule.endswith("bf16"):
        error = (weights - lattice).square().sum() / lattice.square().sum()
        assert error < 1e-5
    else:
        assert torch.equal(weights, lattice), "not one number differs"


def test_what_was_bf16_before_it_was_f32() -> None:
    lattice = RULES["max/-8"]().bfloat16().float()
    found, counts = recover(encode(lattice, SCHEMES["f32"]))
    assert counts == Counts(exact=BLOCKS)
    assert torch.equal(decode(found).bfloat16().float(), lattice)


@pytest.mark.parametrize("stored_as", ["f32", "f16", "bf16"])
def test_scales_that_were_no_fp16_keep_their_integers(stored_as: str) -> None:
    scale = _largest() / 7
    stored = encode(_on_grid(scale, -7, 7), SCHEMES[stored_as])
    assert is_lattice(stored)
    found, counts = recover(stored)
    assert counts.searched == 0 and counts.near > 0
    steps = found.blocks[:, :2].copy().view(np.float16).astype(np.float32)
    integers = (decode(found).view(-1, 32) / torch.from_numpy(steps)).round()
    expected = (_weights().view(-1, 32) / scale).round()
    assert torch.equal(integers.abs(), expected.abs()), "a scale may be found with either sign"


def test_longer_groups_are_lattices_too() -> None:
    groups = _weights().view(-1, 128)
    scale = (groups.abs().amax(dim=1, keepdim=True) / 7).half().float()
    lattice = (scale * (groups / scale).round()).view(ROWS, WIDTH)
    assert torch.equal(decode(recover(encode(lattice, SCHEMES["f32"]))[0]), lattice)


def _shifted() -> Tensor:
    """Sixteen levels, but not around zero, as in q4_1."""
    blocks = _weights().view(-1, 32)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    step = (high - low) / 15
    return (((blocks - low) / step).round() * step + low).view(ROWS, WIDTH)


OTHERS: dict[str, Callable[[], Tensor]] = {
    "student": _weights,
    "gaussian": lambda: torch.from_numpy(
        np.random.default_rng(1).standard_normal((ROWS, WIDTH), np.float32)
    ),
    "uniform": lambda: torch.from_numpy(
        np.random.default_rng(2).random((ROWS, WIDTH), np.float32) - 0.5
    ),
    "q8_0": lambda: decode(encode(_weights(), SCHEMES["q8_0"])),
    "q6_k": lambda: decode(encode(_weights(), SCHEMES["q6_k"])),
    "shifted": _shifted,
    "half a lattice": lambda: torch.cat([RULES["+-7"]()[:48], _weights()[48:]]),
    "another block's lattice": lambda: RULES["max/-8"]().roll(16, dims=1),
}


@pytest.mark.parametrize("stored_as", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_weights_are_no_lattice(kind: str, stored_as: str) -> None:
    assert not is_lattice(encode(OTHERS[kind](), SCHEMES[stored_as]))


def test_what_has_no_blocks_is_no_lattice() -> None:
    lattice = RULES["max/-8"]()
    assert not is_lattice(encode(lattice[:, :16], SCHEMES["f32"]))
    assert not is_lattice(encode(lattice[0], SCHEMES["f32"])), "a vector"
    assert not is_lattice(encode(lattice, Q4_0)), "already in blocks"


def test_a_block_beside_the_lattice_is_searched() -> None:
    lattice = RULES["searched"]()
    broken = lattice.clone()
    broken.view(-1, 32)[[7, 4000]] = _weights().view(-1, 32)[[7, 4000]]
    stored = encode(broken, SCHEMES["bf16"])
    assert is_lattice(stored)
    found, counts = recover(stored)
    assert counts == Counts(exact=BLOCKS - 2, searched=2)
    searched = encode(decode(stored), Q4_0, method="search")
    assert np.array_equal(found.blocks[[7, 4000]], searched.blocks[[7, 4000]])


def test_plus_and_minus_eight_do_not_fit() -> None:
    block = torch.zeros(1, 32)
    block[0, :4] = torch.tensor([8.0, -8.0, 3.0, 1.0])
    assert not is_lattice(encode(block, SCHEMES["f32"]))
    block[0, 2:4] = torch.tensor([6.0, 2.0])  # all even: a lattice of half as many
    found, counts = recover(encode(block, SCHEMES["f32"]))
    assert counts == Counts(exact=1) and torch.equal(decode(found), block)


SCALES = st.floats(2.0**-24, 2.0**12, width=16) | st.floats(-(2.0**12), -(2.0**-24), width=16)


@settings(max_examples=300, deadline=None)
@given(
    scale=SCALES,
    integers=hnp.arrays(np.int8, (1, 32), elements=st.integers(-8, 7)),
    stored_as=st.sampled_from(["f32", "f16", "bf16"]),
)
def test_any_block_comes_back(scale: float, integers: np.ndarray, stored_as: str) -> None:
    stored = encode(scale * torch.from_numpy(integers).float(), SCHEMES[stored_as])
    assert is_lattice(stored)
    found, counts = recover(stored)
    assert counts == Counts(exact=1)
    again = decode(encode(decode(found), SCHEMES[stored_as]))
    assert torch.equal(again, decode(stored))


def test_rows_of_a_view(tmp_path: object) -> None:
    """Stored bytes may be a read-only map, and a part of one."""
    stored = encode(RULES["max/-8"](), SCHEMES["bf16"])
    whole = recover(stored)[0].data
    stored.data.flags.writeable = False
    part = QTensor(stored.scheme, (10, WIDTH), stored.data[5:15])
    assert np.array_equal(recover(part)[0].data, whole[5:15])
