"""The loss of drafts: how far the drafter's distribution is from the target's, where it counts.

With p the target's distribution and q the drafter's, a draft is right with the chance
`overlap = sum min(p, q)` (with noise that is shared as well as can be). Its complement is what we
want to be small, but its gradient is weak where q is far from p; there the forward divergence
KL(p || q) leads. The loss of a row is `mix * H(p, q) + (1 - mix) * (1 - overlap)`, where the
mixture `mix = exp(-3 overlap)` is a constant: divergence at first, acceptance in the end. H is the
cross entropy: the divergence, and the target's own entropy, which no drafter changes.

Logits exist for some rows at a time and are not kept: the gradient at the states that the head is
applied to is made on the way forward, and is all that the way back needs.
Source of the mixture: "LK losses" (arXiv 2602.23881).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EAGER = 3.0
AT_ONCE = 1 << 19  # logits that exist at once, of each kind: they stay in the processor's caches
TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Drafts of R rows: the loss (with gradients), and what it was made of, by row, without.

    `survival`: how likely the token given is drafted where the target says it, min(1, q / p);
    `right`: whether the likeliest tokens agree.
    """

    loss: Tensor
    overlap: Tensor
    survival: Tensor
    right: Tensor


def judge(
    states: Tensor,
    head: Tensor,
    wanted: Tensor,
    taken: Tensor,
    weights: Tensor,
    *,
    tokens: Tensor | None = None,
) -> Judged:
    """The drafts that a head [S, d] makes of states [R, d], against p = `wanted` [R, V].

    `taken` [R] are the tokens that came; a row's loss counts by its weight [R]. `tokens` [S] are
    those of the head's rows where it is a shortlist; the divergence is then that of these tokens.
    """
    loss, overlap, survival, right = _Judge.apply(states, head, wanted, taken, weights, tokens)  # type: ignore[misc]
    return Judged(loss=loss, overlap=overlap, survival=survival, right=right)


class _Judge(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        states: Tensor,
        head: Tensor,
        wanted: Tensor,
        taken: Tensor,
        weights: Tensor,
        tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        size = max(1, AT_ONCE // head.shape[0])
        at_states = torch.empty_like(states)
        at_head = torch.zeros_like(head) if head.requires_grad else None
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            p = wanted[rows]
            found, at_logits = _compared(p, states[rows] @ head.T, taken[rows], tokens)
            at_logits *= weights[rows, None]
            at_states[rows] = at_logits @ head
            if at_head is not None:
                at_head.addmm_(at_logits.T, states[rows])
            parts.append(found)
        losses, overlap, survival, right = (torch.cat(it) for it in zip(*parts, strict=True))
        loss = (weights * losses).sum()
        ctx.save_for_backward(at_states, at_head)
        ctx.mark_non_differentiable(overlap, survival, right)
        return loss, overlap, survival, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        at_states, at_head = ctx.saved_tensors
        head = None if at_head is None else grads[0] * at_head
        return grads[0] * at_states, head, None, None, None, None


def _compared(
    p: Tensor, logits: Tensor, taken: Tensor, tokens: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Of each row: its loss, overlap, survival, whether the likeliest agree; and the gradient of
    the losses at the logits of q."""
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    best, theirs = q.argmax(-1), p.gather(-1, taken[:, None])[:, 0]
    if tokens is None:
        right, own = p.argmax(-1) == best, q.gather(-1, taken[:, None])[:, 0]
    else:
        right, own = p.argmax(-1) == tokens[best], (q * (tokens == taken[:, None])).sum(-1)
        p = p[:, tokens]
    survival = (own / theirs.clamp(min=TINY)).clamp(max=1.0)
    overlap = torch.minimum(p, q).sum(-1)
    mix = torch.exp(-EAGER * overlap)
    held = 1 / p.sum(-1).clamp(min=TINY)
    crossed = -(p * log_q).sum(-1) * held
    # The gradient at the logits, of the divergence q - p / held, of the overlap q (below - share).
    below = q < p
    share = torch.where(below, q, 0.0).sum(-1)
    at_logits = q * (mix + (1 - mix) * share)[:, None]
    at_logits -= torch.where(below, q, 0.0) * (1 - mix)[:, None]
    at_logits.addcmul_(p, (mix * held)[:, None].expand_as(p), value=-1)
    return (mix * crossed + (1 - mix) * (1 - overlap), overlap, survival, right), at_logits
