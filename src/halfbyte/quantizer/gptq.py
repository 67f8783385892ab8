"""GPTQ on the grid of a scheme: integers rounded one column after the other, each making up for
the errors of those before it.

What is minimised is the error of the layer's output on the calibration data, tr(E H E^T) with
E = weight - stored weight and H = mean of x x^T. The scales are those of a search weighted by the
diagonal of H, as they are stored; so the order of the columns is free: the most important go first,
and nothing about the order is kept. Errors are carried by one Cholesky factorisation,
H = (A + I) D (A + I)^T with A strictly upper: column j is rounded at w_j + sum_i<j e_i A_ij. That
is GPTQ's inverse factor in another form, without an inverse. Two sweeps of `descent` follow, which
refit the scales, too. A row that came out worse than the search's keeps the search's.

Time: K^3 / 3 + 3.5 N K^2 multiplications; memory beside the result: K^2, and a few copies of
`ROWS` rows, or `WEIGHTS` weights if that is more. Sources: Frantar et al. 2022 (GPTQ); Chee et al.
2023 (QuIP: the same, as LDLQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.codec import choose_scales, store
from halfbyte.numerics.grids import grid_of
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales, joined, meant, nearest_on
from halfbyte.quantizer.columns import round_all, transposed
from halfbyte.quantizer.curvature import check, factored
from halfbyte.quantizer.descent import Descent
from halfbyte.specs import Scheme

# Rows at once, and weights if that is more; rows know nothing of each other.
ROWS, WEIGHTS = 2048, 1 << 23
SWEEPS = 2


def solve(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refit: bool = True,
) -> QTensor:
    """`weight` [N, K] stored in `scheme` for inputs with `hessian` [K, K] = mean of x x^T.

    `damping` is relative to the mean diagonal. Without `refit` the scales stay those of the
    search. Raises `InvalidInputError` for a Hessian that is not finite or not positive definite,
    `UnsupportedError` for a scheme without integers, and as `encode` does for the weight.
    """
    check(weight, hessian)
    width = len(hessian)
    order = torch.arange(width, device=hessian.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    regular, carry = factored(hessian, order, damping)
    chosen: list[tuple[Tensor, Scales]] = []
    for rows in weight.detach().float().split(max(ROWS, WEIGHTS // width)):
        plain = choose_scales(rows, scheme, regular.diagonal())
        columns, scales = rows.t().contiguous(), plain.each(transposed)
        integers = round_all(columns, scales, carry, order)
        if refit:
            descent = Descent(columns, regular, integers, scales, grid_of(scheme).storable)
            for _ in range(SWEEPS):
                descent.sweep()
        found = integers.t().contiguous(), scales.each(transposed)
        chosen.append(_better(rows, regular, found, (nearest_on(rows, plain), plain)))
    integers, scales = zip(*chosen, strict=True)
    return store(torch.cat(integers), joined(scales), scheme)


def _better(
    weight: Tensor, hessian: Tensor, found: tuple[Tensor, Scales], plain: tuple[Tensor, Scales]
) -> tuple[Tensor, Scales]:
    """Row by row the one of less output error."""
    values, others = meant(*found), meant(*plain)
    # a H a - b H b = (a - b) H (a + b), for the errors a of one and b of the other.
    gain = ((values - others) @ hessian).mul_(2 * weight - values - others).sum(dim=1)
    kept = (gain < 0).nonzero().flatten()
    found[0][kept], found[1].step[kept] = plain[0][kept], plain[1].step[kept]
    return found
