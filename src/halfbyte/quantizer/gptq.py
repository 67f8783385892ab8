"""GPTQ on the grid of a scheme: integers rounded one column after the other, each making up for
the errors of those before it.

What is minimised is the error of the layer's output on the calibration data, tr(E H E^T) with
E = weight - stored weight and H = mean of x x^T. The scales are those of a search weighted by the
diagonal of H and stay as they are stored, so the order of the columns is free: the most important
go first, and nothing about the order is kept. The errors go back through one Cholesky
factorisation, H = (A + I) D (A + I)^T with A strictly upper; column j is rounded at
w_j + sum_i<j e_i A_ij. That is GPTQ's inverse factor in another form, without an inverse.

Sources: Frantar et al. 2022 (GPTQ); Chee et al. 2023 (QuIP: the same, as LDLQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import InvalidInputError
from halfbyte.numerics.codec import choose_scales, store
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales
from halfbyte.numerics.scales import inverse as reciprocal
from halfbyte.specs import Scheme

BLOCK = 128


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = True,
) -> QTensor:
    """`weight` [N, K] f32 stored in `scheme` for inputs with `hessian` [K, K] = mean of x x^T.

    Raises `InvalidInputError` when the Hessian is not finite or not positive definite even with a
    tenfold damping; weights that are not numbers are refused as `encode` does.
    """
    damped = _damped(hessian, damping)
    importance = damped.diagonal()
    scales = choose_scales(weight, scheme, importance)
    order = importance.argsort(descending=True) if act_order else torch.arange(len(damped))
    feedback = _feedback(damped[order][:, order])
    integers = _round(weight, scales, feedback, order)
    return store(integers, scales, scheme)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    if not bool(torch.isfinite(hessian).all()):
        raise InvalidInputError("the Hessian holds NaN or infinite numbers")
    diagonal = hessian.diagonal()
    return hessian + torch.eye(len(hessian)) * max(float(damping * diagonal.mean()), 1e-30)


def _feedback(hessian: Tensor) -> Tensor:
    """A of H = (A + I) D (A + I)^T."""
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(failed):
        raise InvalidInputError("the Hessian is not positive definite")
    upper = lower.flip(0, 1)
    return upper / upper.diagonal()


def _round(weight: Tensor, scales: Scales, feedback: Tensor, order: Tensor) -> Tensor:
    columns = weight.t()[order].contiguous()
    group = (order // (weight.shape[1] // scales.step.shape[1])).tolist()
    by_group = scales.each(lambda field: field.t().contiguous())
    errors, integers = torch.zeros_like(columns), torch.empty_like(columns)
    inverse = reciprocal(by_group.step)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        targets = columns[start:stop] + feedback[:start, start:stop].t() @ errors[:start]
        for j in range(start, stop):
            g = group[j]
            target = targets[j - start] + feedback[start:j, j] @ errors[start:j]
            q = torch.mul(target, inverse[g], out=integers[j]).round_()
            torch.clamp(q, by_group.low[g], by_group.high[g], out=q)
            torch.addcmul(columns[j], q, by_group.step[g], value=-1, out=errors[j])
    result = torch.empty_like(integers)
    result[order] = integers
    return result.t().contiguous()
