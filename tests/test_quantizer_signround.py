"""SignRound: never worse than where it starts, on the same scales, and each row on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_quantizer_gptq import EVERY, errors, problem, weighted

from halfbyte.errors import IntegrityError, InvalidInputError
from halfbyte.numerics.codec import choose_scales, decode
from halfbyte.numerics.scales import meant, nearest_on
from halfbyte.quantizer import signround
from halfbyte.quantizer.curvature import damped
from halfbyte.specs import scheme_of


@pytest.mark.parametrize("name", EVERY)
def test_rows_get_better_on_the_scales_of_the_search(name: str) -> None:
    weight, hessian = problem(1)
    regular, scheme = damped(hessian, signround.DAMPING), scheme_of(name)
    q = signround.solve(weight, hessian, scheme, steps=30)
    before = errors(weighted(weight, regular, name), weight, regular)
    left = errors(q, weight, regular)
    assert bool((left <= before * (1 + 1e-5)).all()) and left.sum() < 0.98 * before.sum()
    scales = choose_scales(weight, scheme, regular.diagonal())
    assert torch.equal(meant(nearest_on(decode(q), scales), scales), decode(q))
    assert bool(((decode(q) - weight).abs() <= 1.001 * _reach(weight, scales)).all())


def _reach(weight: torch.Tensor, scales: signround.Scales) -> torch.Tensor:
    """A step either way, or the distance to the end of the grid."""
    step = meant(torch.ones_like(weight), scales).abs()
    return torch.maximum(step, (weight - meant(nearest_on(weight, scales), scales)).abs())


def test_no_steps_are_the_search() -> None:
    weight, hessian = problem(2)
    regular = damped(hessian, signround.DAMPING)
    q = signround.solve(weight, hessian, scheme_of("q4_0"), steps=0)
    np.testing.assert_array_equal(q.data, weighted(weight, regular, "q4_0").data)


def test_rows_go_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(3, rows=20)
    whole = signround.solve(weight, hessian, scheme_of("q4_0"), steps=10)
    monkeypatch.setattr(signround, "ROWS", 8)
    parts = signround.solve(weight, hessian, scheme_of("q4_0"), steps=10)
    assert float((decode(parts) != decode(whole)).float().mean()) < 0.01


def test_bad_input_is_refused() -> None:
    weight, hessian = problem(4)
    with pytest.raises(InvalidInputError, match="NaN"):
        signround.solve(weight, hessian * torch.nan, scheme_of("q4_0"))
    weight[0, 0] = torch.inf
    with pytest.raises(IntegrityError):
        signround.solve(weight, hessian, scheme_of("q4_0"), steps=1)
