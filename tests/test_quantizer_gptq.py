"""Laws of GPTQ and of the parts it is made of, on small random problems of every scheme."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import IntegrityError, InvalidInputError, UnsupportedError
from halfbyte.numerics import QTensor
from halfbyte.numerics.codec import choose_scales, decode, encode
from halfbyte.numerics.grids import GRIDS, grid_of
from halfbyte.numerics.scales import meant, nearest_on
from halfbyte.quantizer import gptq
from halfbyte.quantizer.columns import round_columns
from halfbyte.quantizer.curvature import damped, factored, output_error
from halfbyte.quantizer.descent import Descent
from halfbyte.specs import scheme_of

EVERY = sorted(GRIDS)


def problem(
    seed: int, width: int = 256, rows: int = 24, tokens: int = 512
) -> tuple[Tensor, Tensor]:
    """A weight [rows, width] and the second moment of inputs that few factors drive."""
    chance = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width // 4, width, generator=chance)
    x = torch.randn(tokens, width // 4, generator=chance) @ mixing / 4
    x = (x + torch.randn(tokens, width, generator=chance)) * torch.rand(width, generator=chance)
    return torch.randn(rows, width, generator=chance) * 0.02, x.T @ x / tokens


def weighted(weight: Tensor, hessian: Tensor, name: str) -> QTensor:
    return encode(weight, scheme_of(name), method="search", importance=hessian.diagonal())


def errors(q: QTensor, weight: Tensor, hessian: Tensor) -> Tensor:
    return output_error((weight - decode(q)).double(), hessian.double())


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 40, 700]))
def test_no_row_is_worse_than_a_weighted_search(name: str, seed: int, tokens: int) -> None:
    weight, hessian = problem(seed, tokens=tokens)
    regular = damped(hessian, 0.01)
    ours, plain = gptq.solve(weight, hessian, scheme_of(name)), weighted(weight, regular, name)
    left, before = (errors(q, weight, regular) for q in (ours, plain))
    assert bool((left <= before * (1 + 1e-4)).all())
    assert left.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("name", EVERY)
def test_without_refit_the_scales_are_those_of_the_search(name: str) -> None:
    weight, hessian = problem(1)
    scheme = scheme_of(name)
    scales = choose_scales(weight, scheme, damped(hessian, 0.01).diagonal())
    values = decode(gptq.solve(weight, hessian, scheme, refit=False))
    integers = nearest_on(values, scales)
    assert torch.equal(meant(integers, scales), values)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("size", [1.0, 1e-3, 0.0])
def test_inputs_that_know_nothing_of_each_other_leave_the_search(name: str, size: float) -> None:
    weight, _ = problem(2)
    hessian = torch.eye(256) * size
    ours = gptq.solve(weight, hessian, scheme_of(name), refit=False)
    plain = weighted(weight, torch.eye(256), name)
    np.testing.assert_array_equal(ours.data, plain.data)
    refitted = errors(gptq.solve(weight, hessian, scheme_of(name)), weight, torch.eye(256))
    assert bool((refitted <= errors(plain, weight, torch.eye(256)) * (1 + 1e-5)).all())


@pytest.mark.parametrize("name", EVERY)
def test_only_relations_between_inputs_matter(name: str) -> None:
    weight, hessian = problem(3)
    ours = gptq.solve(weight, hessian, scheme_of(name))
    np.testing.assert_array_equal(
        gptq.solve(weight, hessian * 1024, scheme_of(name)).data, ours.data
    )


def test_the_order_of_groups_and_of_rows_changes_nothing() -> None:
    """Columns go by their importance, so whole groups may stand anywhere."""
    weight, hessian = problem(4)
    groups = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    columns = (groups[:, None] * 32 + torch.arange(32)).flatten()
    rows = torch.randperm(24)
    ours = decode(gptq.solve(weight, hessian, scheme_of("q4_0"), refit=False))
    moved = gptq.solve(
        weight[rows][:, columns], hessian[columns][:, columns], scheme_of("q4_0"), refit=False
    )
    # Rounding errors of the products may tip a weight that lies between two integers.
    assert float((decode(moved) != ours[rows][:, columns]).float().mean()) < 0.01


def test_a_row_does_not_depend_on_those_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(5, rows=40)
    whole = gptq.solve(weight, hessian, scheme_of("q4_0"))
    monkeypatch.setattr(gptq, "ROWS", 16)
    monkeypatch.setattr(gptq, "WEIGHTS", 0)
    parts = gptq.solve(weight, hessian, scheme_of("q4_0"))
    assert float((decode(parts) != decode(whole)).float().mean()) < 0.01


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_columns_are_rounded_to_nearest(act_order: bool) -> None:
    weight, hessian = problem(6)
    dead = torch.arange(256) % 3 == 1
    hessian[dead], hessian[:, dead] = 0.0, 0.0
    scheme = scheme_of("q4_0")
    values = decode(gptq.solve(weight, hessian, scheme, act_order=act_order, refit=False))
    scales = choose_scales(weight, scheme, damped(hessian, 0.01).diagonal())
    plain = meant(nearest_on(weight, scales), scales)
    assert torch.equal(values[:, dead], plain[:, dead])
    assert not torch.equal(values[:, ~dead], plain[:, ~dead])


def test_channels_that_are_always_equal_are_no_obstacle() -> None:
    weight, half = problem(7, width=128, tokens=3)
    weight, hessian = torch.cat([weight, weight.flip(0)], dim=1), half.repeat(2, 2)
    plain = weighted(weight, hessian, "q4_0")
    ours = gptq.solve(weight, hessian, scheme_of("q4_0"))
    assert errors(ours, weight, hessian).sum() < 0.1 * errors(plain, weight, hessian).sum()


def test_a_hessian_that_needs_more_damping_gets_it() -> None:
    """Sums in low precision leave eigenvalues a little below zero."""
    weight, hessian = problem(8, tokens=40)
    mean = hessian.diagonal().mean()
    hessian = hessian - 0.03 * mean * torch.eye(256)
    hessian.diagonal().clamp_(min=0)
    regular, _ = factored(hessian, torch.arange(256), 0.01)
    assert torch.allclose(regular - hessian, 0.1 * hessian.diagonal().mean() * torch.eye(256))
    assert gptq.solve(weight, hessian, scheme_of("q4_0")).shape == (24, 256)


@pytest.mark.gpu
def test_a_gpu_finds_as_good_a_rounding() -> None:
    weight, hessian = problem(12)
    ours = gptq.solve(weight.cuda(), hessian.cuda(), scheme_of("q4_0"))
    left, before = (
        errors(q, weight, hessian).sum()
        for q in (ours, gptq.solve(weight, hessian, scheme_of("q4_0")))
    )
    assert left < 1.02 * before


def test_bad_input_is_refused() -> None:
    weight, hessian = problem(9)
    q4_0 = scheme_of("q4_0")
    for bad, words in (
        (torch.full_like(hessian, torch.nan), "NaN"),
        (-hessian, "not positive definite"),
        (hessian + 50 * (1 - torch.eye(256)), "not positive definite"),
        (hessian[:128, :128], r"\[K, K\]"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            gptq.solve(weight, bad, q4_0)
    weight[3, 7] = torch.nan
    with pytest.raises(IntegrityError, match="1 of"):
        gptq.solve(weight, hessian, q4_0)
    with pytest.raises(UnsupportedError, match="no integers"):
        gptq.solve(weight, hessian, scheme_of("bf16"))
    with pytest.raises(InvalidInputError, match="no multiple"):
        gptq.solve(weight[:, :100], hessian[:100, :100], q4_0)


def test_the_factor_gives_the_hessian_back() -> None:
    _, hessian = problem(10, width=96)
    order = torch.randperm(96)
    regular, carry = factored(hessian, order, 0.01)
    unit = (carry + torch.eye(96)).double()
    inverse = torch.linalg.inv(unit)
    diagonal = inverse @ regular[order][:, order].double() @ inverse.T
    assert torch.equal(carry, carry.triu(1))
    off = diagonal - torch.diag(diagonal.diagonal())
    assert off.abs().max() < 1e-4 * diagonal.diagonal().max()
    assert torch.allclose(regular.diagonal(), hessian.diagonal() + 0.01 * hessian.diagonal().mean())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_columns_carry_what_the_definition_says(seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    base, targets = torch.randn(2, 32, 5, generator=chance)
    carry = torch.randn(32, 32, generator=chance).triu(1) / 8
    scales = choose_scales(base.t().contiguous(), scheme_of("q4_0"))
    scales = scales.each(lambda field: field.t().repeat_interleave(32, 0))
    integers, deviations = round_columns(base, targets, carry, scales)
    for j in range(32):
        target = targets[j] + carry[:j, j] @ deviations[:j]
        expected = (target / scales.step[j]).round().clamp(-8, 7)
        assert float((integers[j] != expected).sum()) <= 1  # a tie, differently summed
        assert torch.allclose(deviations[j], base[j] - integers[j] * scales.step[j])


@pytest.mark.parametrize("name", EVERY)
def test_no_sweep_of_the_descent_makes_a_row_worse(name: str) -> None:
    weight, hessian = problem(11, rows=8)
    regular = damped(hessian, 0.01)
    scales = choose_scales(weight, scheme_of(name))
    integers = nearest_on(weight, scales)
    turned = scales.each(lambda field: field.t().contiguous())
    descent = Descent(
        weight.t().contiguous(),
        regular,
        integers.t().clone(),
        turned,
        grid_of(scheme_of(name)).storable,
    )
    before = output_error(weight - meant(integers, scales), regular)
    for _ in range(4):
        descent.sweep()
        found = descent.scales.each(Tensor.t)
        left = output_error(weight - meant(descent.integers.t(), found), regular)
        assert bool((left <= before * (1 + 1e-5)).all())
        before = left
