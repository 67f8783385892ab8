"""How far a student's predictions are from its teacher's, over the whole vocabulary.

KL(teacher || student) of every row, exact, from final states and heads. The logits of a few rows
exist at a time: their gradients are taken at once, and what is kept for the way back are those at
the student's states and head.

Few rows make most of a mean KL, and most of the noise of its gradients. For training it can be
bounded: a row counts t log(1 + KL / t), with t a typical KL, which is its KL where that is small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfbyte.training.heads import StoredHead

AT_ONCE = 1 << 20  # logits of each side that exist at once: 4 MiB, which a cache holds

Logits = Callable[[int, int], Tensor]
"""(first row, row after the last) -> the teacher's logits of these rows, soft cap and all."""


def divergence(
    states: Tensor,
    head: Tensor | StoredHead,
    teacher: Logits,
    weights: Tensor,
    *,
    softcap: float | None,
    targets: Tensor | None = None,
    shares: Tensor | None = None,
    typical: float | None = None,
    beside: Tensor | None = None,
    at_once: int = AT_ONCE,
) -> Tensor:
    """The mean over rows of the KL(teacher || student), weighted by `weights` [R].

    states [R, H] and head [V, H] f32 are the student's; a stored head has no gradient. `typical`
    bounds what a row counts. With `shares` [R] it is 1 - share of that, plus the share of -log p of
    `targets` [R]. `beside` [R, H] is added to the gradient at the states, and counts no more.
    """
    loss: Tensor = _Divergence.apply(  # type: ignore
        states, head, teacher, weights, softcap, targets, shares, typical, beside, at_once
    )
    return loss


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor | StoredHead,
        teacher: Logits,
        weights: Tensor,
        softcap: float | None,
        targets: Tensor | None,
        shares: Tensor | None,
        typical: float | None,
        beside: Tensor | None,
        at_once: int,
    ) -> Tensor:
        at_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        trained = isinstance(head, Tensor)
        at_head = torch.zeros_like(head) if trained and ctx.needs_input_grad[1] else None
        share = weights / weights.sum().clamp(min=1e-30)
        loss = states.new_zeros((), dtype=torch.float64)
        step = max(1, at_once // len(head))
        for start in range(0, len(states), step):
            rows = slice(start, min(start + step, len(states)))
            own = states[rows] @ head.t() if trained else head.product(states[rows])
            bent = None
            if softcap is not None:
                bent = own.div_(softcap).tanh_()
                own = bent * softcap
            log_p = own.log_softmax(-1)
            del own
            known = teacher(rows.start, rows.stop).log_softmax(-1)
            wanted = known.exp()
            each = known.sub_(log_p).mul_(wanted).sum(-1, keepdim=True)
            each, slope = _bounded(each, typical)
            right, own_share = None, None
            if shares is not None and targets is not None:
                right, own_share = targets[rows, None], shares[rows, None]
                each = torch.lerp(each, log_p.gather(1, right).neg_(), own_share)
                slope = slope * (1 - own_share)
            loss += (each[:, 0].double() * share[rows]).sum()
            if at_states is None:
                continue
            p = log_p.exp_()
            at_z = wanted.neg_().add_(p).mul_(slope * share[rows, None])
            if right is not None and own_share is not None:
                said = own_share * share[rows, None]
                at_z.addcmul_(p, said).scatter_add_(1, right, -said)
            if bent is not None:
                at_z.addcmul_(at_z, bent.square_(), value=-1)
            at_states[rows] = at_z @ head if trained else head.back(at_z)
            if at_head is not None:
                at_head.addmm_(at_z.t(), states[rows])
        if at_states is not None and beside is not None:
            at_states += beside
        ctx.save_for_backward(at_states, at_head)
        return loss.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        at_states, at_head = (
            None if found is None else found.mul_(gradients[0]) for found in ctx.saved_tensors
        )
        return at_states, at_head, *(None,) * 8


def _bounded(each: Tensor, typical: float | None) -> tuple[Tensor, Tensor]:
    """What KLs [R, 1] count, and the slope of that."""
    if typical is None:
        return each, torch.ones_like(each)
    sizes = (each / typical).clamp_(min=0)
    return typical * sizes.log1p(), 1 / (1 + sizes)
