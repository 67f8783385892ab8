"""AWQ: channels scaled up before rounding where their inputs are large.

A weight's column c is multiplied by s_c and its inputs are divided by it, which changes nothing but
the rounding: columns that matter take more of their group's range. s_c = (rms of x_c)^a / (mean of
|w_c|)^(1 - a), and of twenty a in [0, 1) the one of least output error is taken for all the weights
that share the inputs.

What it is not: the folding of 1 / s into what makes the inputs, which knows the model. The original
clips weights by a search of its own, where here the scales are searched anyway, and it takes the
mean of |x_c|, where this takes the root of the mean square, which the Hessian holds.
Sources: Lin et al. 2023; llm-compressor's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.numerics.codec import decode, encode
from halfbyte.quantizer.curvature import check, output_error
from halfbyte.specs import Scheme

GRID = 20
SMALLEST = 1e-4


def channel_scales(weights: Sequence[Tensor], hessian: Tensor, scheme: Scheme) -> Tensor:
    """The factors [K] of the columns of `weights` [N, K] that share inputs with `hessian` [K, K].

    All ones where nothing is better. Raises as `gptq.solve` does.
    """
    for weight in weights:
        check(weight, hessian)
    activations = hessian.diagonal().sqrt()
    magnitudes = torch.cat([weight.abs() for weight in weights]).mean(dim=0)
    best, least = torch.ones_like(activations), torch.inf
    for index in range(GRID + 1):
        factors = torch.ones_like(activations)
        if index < GRID:
            factors = _factors(activations, magnitudes, index / GRID)
        error = sum(_error(weight, hessian, scheme, factors) for weight in weights)
        if error < least:
            best, least = factors, error
    return best


def _factors(activations: Tensor, magnitudes: Tensor, exponent: float) -> Tensor:
    """One candidate; the largest and the smallest are each other's inverse."""
    wished = activations.pow(exponent) / magnitudes.pow(1 - exponent).clamp(min=SMALLEST)
    wished = wished.clamp(min=SMALLEST)
    return wished / (wished.max() * wished.min()).sqrt()


def _error(weight: Tensor, hessian: Tensor, scheme: Scheme, factors: Tensor) -> float:
    """The output error of a weighted search on the scaled weight, scaled back."""
    importance = hessian.diagonal() / factors.square()
    q = encode(weight * factors, scheme, method="search", importance=importance)
    return float(output_error(weight - decode(q, device=weight.device) / factors, hessian).sum())
