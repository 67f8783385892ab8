"""The reference ops for training: whole windows of one length at once, with fused attention.

All spans begin at position 0 and are equally long, so that attention is one product over all of
them. What is kept for the way back is what the products need and no more: a norm keeps its input
and one number a row, and makes the rest again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import LowRank, Rows
from halfbyte.kernels.reference.kv import KV, ScratchKV
from halfbyte.kernels.reference.ops import ReferenceOps, Weight
from halfbyte.specs import AttentionSpec


class TrainingOps(ReferenceOps):
    """Weights are given dense, and the only adapter of all rows as tensors; nothing is rounded on
    the way."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device, exact_rows=False, decoded_bytes=sys.maxsize)

    def rms_norm(self, x: Tensor, weight: Weight | None, eps: float) -> Tensor:
        normed: Tensor = _Normed.apply(x, None if weight is None else self._dense(weight), eps)  # type: ignore
        return normed

    def _updated(self, y: Tensor, x: Tensor, updates: Sequence[LowRank | None]) -> Tensor:
        for update in updates:
            if update is not None:
                y = y.addmm_(x @ update.a.t(), update.b.t(), alpha=update.scale)
        return y

    def attend(self, q: Tensor, *, attention: AttentionSpec, rows: Rows, kv: KV) -> Tensor:
        assert isinstance(kv, ScratchKV)
        length = rows.spans[0].count
        q_BNTD = _by_window(q.unflatten(-1, (-1, attention.head_dim)), length)
        k_BGTD, v_BGTD = (_by_window(part, length) for part in kv.all)
        window = attention.window
        seen = None
        if window is not None and window < length:
            places = torch.arange(length, device=q.device)
            apart = places[:, None] - places
            seen = (apart >= 0) & (apart < window)
        mixed = functional.scaled_dot_product_attention(
            q_BNTD,
            k_BGTD,
            v_BGTD,
            attn_mask=seen,
            is_causal=seen is None,
            scale=attention.scale,
            enable_gqa=attention.heads != attention.kv_heads,
        )
        return mixed.transpose(1, 2).reshape(q.shape)


def _by_window(x_RND: Tensor, length: int) -> Tensor:
    """[windows, heads, length, D]."""
    return x_RND.unflatten(0, (-1, length)).transpose(1, 2)


class _Normed(torch.autograd.Function):
    """Keeps x [..., K] and one number for each of its rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        at_normed, at_weight = gradients[0], None
        if weight is not None:
            if ctx.needs_input_grad[1]:
                at_weight = (normed * at_normed).flatten(0, -2).sum(0)
            at_normed = at_normed * weight
        drift = (normed * at_normed).mean(-1, keepdim=True)
        return normed.mul_(drift).neg_().add_(at_normed).mul_(scale), at_weight, None
