"""The Hessian of a layer's output error: checked, damped, factored, and the error it measures.

For inputs x with H = mean of x x^T, a weight that is stored as w - e has the output error
tr(e H e^T) per token. Damping adds a part of the mean diagonal to the diagonal: what little data
says with certainty, the next data contradicts. A channel that never was active has an H of zeros;
damped, it stands alone: its weights are rounded to nearest, and carry nobody's error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.errors import InvalidInputError

ATTEMPTS = 3  # each with ten times the damping of the one before
TINY = 1e-30


def check(weight: Tensor, hessian: Tensor) -> None:
    """Raises `InvalidInputError` unless the Hessian suits a weight [N, K] and is one at all."""
    width = weight.shape[-1]
    if weight.ndim != 2 or hessian.shape != (width, width):
        raise InvalidInputError(
            f"a weight [N, K] goes with a Hessian [K, K], "
            f"not {tuple(weight.shape)} with {tuple(hessian.shape)}"
        )
    if not bool(hessian.isfinite().all()):
        raise InvalidInputError(
            "the Hessian holds NaN or infinite numbers", hint="look for them in the activations"
        )
    if bool((hessian.diagonal() < 0).any()):
        raise _indefinite()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with `damping` times its mean diagonal added to the diagonal, f32."""
    result = hessian.float().clone()
    added = damping * float(result.diagonal().mean())
    result.diagonal().add_(max(added, TINY))
    return result


def factored(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped H, and A of its (A + I) D (A + I)^T with A strictly upper, columns in `order`.

    Tries f32, then f64, then more damping. Raises `InvalidInputError`.
    """
    backwards = order.flip(0)
    for attempt in range(ATTEMPTS):
        regular = damped(hessian, damping * 10**attempt)
        for dtype in (torch.float32, torch.float64):
            reversed_ = regular[backwards[:, None], backwards].to(dtype)
            lower, failed = torch.linalg.cholesky_ex(reversed_)
            if not int(failed):
                upper = lower.flip(0, 1)
                return regular, upper.div_(upper.diagonal().clone()).triu_(1).float()
    raise _indefinite()


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """e H e^T of every row e of `difference` [N, K]: f32 [N]."""
    return (difference @ hessian).mul_(difference).sum(dim=1)


def _indefinite() -> InvalidInputError:
    return InvalidInputError(
        "the Hessian is not positive definite",
        hint="more calibration tokens, or a larger damping",
    )
