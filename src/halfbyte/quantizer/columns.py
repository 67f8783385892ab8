"""Rounding one column after the other, with what is left over carried to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.scales import Scales, inverse

BLOCK = 128  # columns whose errors reach the others at once


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


def round_all(weight: Tensor, scales: Scales, carry: Tensor, order: Tensor) -> Tensor:
    """Integers [K, N] of a weight [K, N], a column to a row, its columns taken in `order`.

    `carry` [K, K] is in that order, too, and the scales are [groups, N].
    """
    group = order // (len(weight) // len(scales.step))
    integers, deviations = torch.empty_like(weight), torch.empty_like(weight)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        base = weight[order[start:stop]]
        targets = torch.addmm(base, carry[:start, start:stop].t(), deviations[:start])
        own = scales.each(lambda field, place=group[start:stop]: field[place])
        integers[order[start:stop]], deviations[start:stop] = round_columns(
            base, targets, carry[start:stop, start:stop], own
        )
    return integers


def transposed(field: Tensor) -> Tensor:
    """[K, N] of [N, K], laid out so."""
    return field.t().clone(memory_format=torch.contiguous_format)
