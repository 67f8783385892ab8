"""AWQ's channel scales: they pay where channels differ, and keep off where they do not."""

from __future__ import annotations

import pytest
import torch
from test_quantizer_gptq import problem
from torch import Tensor

from halfbyte.errors import InvalidInputError
from halfbyte.numerics.codec import decode, encode
from halfbyte.quantizer import awq
from halfbyte.quantizer.curvature import output_error
from halfbyte.specs import scheme_of


def error(weights: list[Tensor], hessian: Tensor, name: str, factors: Tensor) -> float:
    total = 0.0
    for weight in weights:
        importance = hessian.diagonal() / factors.square()
        q = encode(weight * factors, scheme_of(name), method="search", importance=importance)
        total += float(output_error(weight - decode(q) / factors, hessian).sum())
    return total


@pytest.mark.parametrize("name", ["q4_0", "int4-g128", "uint4-g32"])
def test_weights_that_share_inputs_gain_together(name: str) -> None:
    weight, hessian = problem(1, rows=48)
    channels = torch.logspace(-1, 1, 256)[torch.randperm(256)]
    hessian = hessian * channels * channels[:, None]
    weights = [weight[:32], 3 * weight[32:]]
    factors = awq.channel_scales(weights, hessian, scheme_of(name))
    assert factors.shape == (256,) and bool((factors > 0).all())
    plain = error(weights, hessian, name, torch.ones(256))
    assert error(weights, hessian, name, factors) < 0.9 * plain
    assert bool((factors.log() * channels.log()).sum() > 0)  # large inputs, finer steps


def test_ones_where_nothing_is_to_be_gained() -> None:
    weight = torch.randn(16, 256).sign()
    factors = awq.channel_scales([weight], torch.eye(256), scheme_of("q8_0"))
    assert torch.allclose(factors, torch.ones(256))


def test_channels_without_inputs_or_weights_stay_finite() -> None:
    weight, hessian = problem(2)
    hessian[:40], hessian[:, :40] = 0.0, 0.0
    weight[:, 30:60] = 0.0
    factors = awq.channel_scales([weight], hessian, scheme_of("q4_0"))
    assert bool(factors.isfinite().all()) and bool((factors > 0).all())


def test_a_hessian_of_another_width_is_refused() -> None:
    weight, hessian = problem(3)
    with pytest.raises(InvalidInputError, match=r"\[K, K\]"):
        awq.channel_scales([weight, weight[:, :128]], hessian, scheme_of("q4_0"))
