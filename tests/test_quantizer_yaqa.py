"""Laws of the rounding of both sides, on small random problems of every scheme."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.grids import GRIDS
from halfbyte.quantizer import gptq, yaqa
from halfbyte.quantizer.curvature import damped
from halfbyte.specs import scheme_of

EVERY = sorted(GRIDS)


def moment(chance: torch.Generator, width: int, tokens: int) -> Tensor:
    """Of rows that few factors drive."""
    x = torch.randn(tokens, width // 4, generator=chance) @ torch.randn(
        width // 4, width, generator=chance
    )
    x = (x / 4 + torch.randn(tokens, width, generator=chance)) * torch.rand(width, generator=chance)
    return x.T @ x / tokens


def problem(seed: int, tokens: int = 512, rows: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [rows, 256], A and G."""
    chance = torch.Generator().manual_seed(seed)
    inputs, outputs = moment(chance, 256, tokens), moment(chance, rows, tokens)
    return torch.randn(rows, 256, generator=chance) * 0.02, inputs, outputs


def cost(q: QTensor, weight: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """tr(G e A e^T), both moments damped as they are for the rounding."""
    inputs = damped(inputs, yaqa.INPUT_DAMPING).double()
    outputs = damped(outputs, yaqa.OUTPUT_DAMPING).double()
    error = (weight - decode(q)).double()
    return float((outputs @ error @ inputs * error).sum())


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 60, 700]))
def test_it_is_never_worse_than_a_weighted_search(name: str, seed: int, tokens: int) -> None:
    weight, inputs, outputs = problem(seed, tokens)
    importance = damped(inputs, yaqa.INPUT_DAMPING).diagonal()
    plain = encode(weight, scheme_of(name), method="search", importance=importance)
    ours = yaqa.solve(weight, inputs, outputs, scheme_of(name))
    before = cost(plain, weight, inputs, outputs)
    assert cost(ours, weight, inputs, outputs) < 0.9 * before


@pytest.mark.parametrize("name", ["q4_0", "int4-g128", "uint4-g32"])
def test_knowing_the_outputs_is_worth_something(name: str) -> None:
    for seed in range(3):
        problem_ = weight, inputs, outputs = problem(seed)
        one = gptq.solve(weight, inputs, scheme_of(name))
        both = yaqa.solve(weight, inputs, outputs, scheme_of(name))
        assert cost(both, *problem_) < 0.95 * cost(one, *problem_)


@pytest.mark.parametrize("name", EVERY)
def test_only_relations_matter(name: str) -> None:
    weight, inputs, outputs = problem(3)
    ours = decode(yaqa.solve(weight, inputs, outputs, scheme_of(name)))
    scaled = decode(yaqa.solve(weight, inputs * 1024, outputs / 4096, scheme_of(name)))
    assert torch.equal(ours, scaled)


def test_outputs_that_know_nothing_of_each_other_are_rounded_alone() -> None:
    """Then rows go as GPTQ's, which sweeps once less."""
    weight, inputs, _ = problem(4)
    alone = yaqa.solve(weight, inputs, torch.eye(len(weight)), scheme_of("q4_0"))
    one = gptq.solve(weight, inputs, scheme_of("q4_0"))
    assert cost(alone, weight, inputs, torch.eye(len(weight))) <= 1.0001 * cost(
        one, weight, inputs, torch.eye(len(weight))
    )


def test_rows_that_are_nearly_one_do_not_undo_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone would make up for all of the others' error; a sweep keeps what made it less."""
    weight, inputs, _ = problem(5, rows=32)
    outputs = torch.ones(32, 32) + 0.01 * torch.eye(32)
    costs: list[float] = []
    for sweeps in range(5):
        monkeypatch.setattr(yaqa, "SWEEPS", sweeps)
        costs.append(cost(yaqa.solve(weight, inputs, outputs, scheme_of("q4_0")), weight, inputs,
                          outputs))  # fmt: skip
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(costs))


def test_dead_channels_on_both_sides() -> None:
    weight, inputs, outputs = problem(6)
    inputs[:, 7] = inputs[7] = 0
    outputs[:, 3] = outputs[3] = 0
    values = decode(yaqa.solve(weight, inputs, outputs, scheme_of("q4_0")))
    assert bool(values.isfinite().all())
    assert float((values - weight).norm() / weight.norm()) < 0.3


def test_errors() -> None:
    weight, inputs, outputs = problem(7)
    scheme = scheme_of("q4_0")
    with pytest.raises(InvalidInputError, match="goes with a Hessian"):
        yaqa.solve(weight, inputs, outputs[1:, 1:], scheme)
    with pytest.raises(InvalidInputError, match="NaN"):
        yaqa.solve(weight, inputs, outputs * float("nan"), scheme)
    with pytest.raises(InvalidInputError, match="not positive definite"):
        yaqa.solve(weight, inputs, -outputs, scheme)
    with pytest.raises(UnsupportedError):
        yaqa.solve(weight, inputs, outputs, scheme_of("f32"))
    with pytest.raises(IntegrityError):
        yaqa.solve(weight * float("inf"), inputs, outputs, scheme)
