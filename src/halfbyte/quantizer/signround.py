"""SignRound: which way to round each weight, learned by the signs of a gradient.

The scales are those of a search weighted by the diagonal of H, and stay. A weight becomes
round(w / step + v) with v in [-1/2, 1/2], and v follows the sign of the gradient of the layer's
output error tr(E H E^T), straight through the rounding, in steps that shrink from 1 / `steps` to 0.
Each row keeps its best rounding, the search's included.

What it is not: AutoRound, which takes the gradient of a whole decoder block's output; this sees one
matrix, and needs nothing but H. Price: `steps` products of N K^2, some sixty times GPTQ's.
Source: Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent".
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.codec import choose_scales, store
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales, inverse, joined
from halfbyte.quantizer.curvature import check, damped
from halfbyte.specs import Scheme

ROWS = 4096  # rows at once; they know nothing of each other
DAMPING = 0.01


def solve(weight: Tensor, hessian: Tensor, scheme: Scheme, *, steps: int = 200) -> QTensor:
    """`weight` [N, K] stored in `scheme` for inputs with `hessian` [K, K] = mean of x x^T.

    Raises as `gptq.solve` does.
    """
    check(weight, hessian)
    regular = damped(hessian, DAMPING)
    chosen: list[tuple[Tensor, Scales]] = []
    for rows in weight.detach().float().split(ROWS):
        scales = choose_scales(rows, scheme, regular.diagonal())
        chosen.append((_learned(rows, regular, scales, steps), scales))
    integers, scales = zip(*chosen, strict=True)
    return store(torch.cat(integers), joined(scales), scheme)


def _learned(weight: Tensor, hessian: Tensor, scales: Scales, steps: int) -> Tensor:
    """The best integers [N, K] met on the way."""
    group = weight.shape[1] // scales.step.shape[1]
    step, low, high = (
        field.repeat_interleave(group, 1) for field in (scales.step, scales.low, scales.high)
    )
    scaled, offset = weight * inverse(step), torch.zeros_like(weight)
    best = torch.empty_like(weight)
    least = torch.full_like(weight[:, 0], torch.inf)
    rates = [(steps - index) / steps**2 for index in range(steps)]
    for rate in (*rates, 0.0):
        wished = (scaled + offset).round_()
        integers = wished.clamp(low, high)
        rest = torch.addcmul(weight, integers, step, value=-1)
        slope = rest @ hessian  # the gradient of the error is -2 times this, by the step
        error = (slope * rest).sum(dim=1)
        wins = error < least
        best[wins], least[wins] = integers[wins], error[wins]
        inside = integers == wished
        offset.add_((slope * step).sign_().mul_(inside), alpha=rate).clamp_(-0.5, 0.5)
    return best
