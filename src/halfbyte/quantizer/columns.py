"""Rounding one column after the other, with what is left over carried to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.scales import Scales, inverse


def round_columns(
    base: Tensor, targets: Tensor, carry: Tensor, scales: Scales
) -> tuple[Tensor, Tensor]:
    """Integers [n, N] for n columns of N weights, and the deviations [n, N] of `base` from them.

    Column j is rounded at targets[j] + sum over i < j of carry[i, j] * deviation[i]. All f32, a
    column to a row; the scales are [n, N], each column's own.
    """
    integers, deviations = torch.empty_like(base), torch.empty_like(base)
    inverses, carried = inverse(scales.step), carry.t().contiguous()
    for j, column in enumerate(integers):
        target = torch.addmv(targets[j], deviations[:j].t(), carried[j, :j])
        torch.mul(target, inverses[j], out=column).round_()
        torch.clamp(column, scales.low[j], scales.high[j], out=column)
        torch.addcmul(base[j], column, scales.step[j], value=-1, out=deviations[j])
    return integers, deviations
