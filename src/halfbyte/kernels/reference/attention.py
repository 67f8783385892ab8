"""Softmax attention of one span over its cached keys, in tiles that do not depend on the batch.

Queries run in tiles of `ROW_TILE` rows, keys in tiles of `KEY_TILE` positions aligned to absolute
positions. The tiles of a row are combined in ascending order with a running maximum (the online
softmax of Milakov and Gimelshein, arXiv 1805.02867). A tile that a row does not see changes
nothing, not even a bit, so a row's result is the same however long the others are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import Span
from halfbyte.kernels.reference.kv import KV
from halfbyte.specs import AttentionSpec

ROW_TILE = 16
KEY_TILE = 64
# Finite, so that a row that has seen nothing yet makes no NaN (-inf minus -inf).
NOTHING = -1e30


def attend_span(
    q_TND: Tensor, attention: AttentionSpec, span: Span, kv: KV, *, exact_rows: bool
) -> Tensor:
    """[T, N, D]: attention of the span's rows over positions up to their own.

    q_TND: rotated queries of the span's T rows. Without `exact_rows` it is one plain softmax.
    """
    window = attention.window or span.start + span.count
    if not exact_rows:
        return _attend_whole(q_TND, attention, window, span, kv)
    low = max(0, span.start - window + 1) // KEY_TILE * KEY_TILE
    high = -(-(span.start + span.count) // KEY_TILE) * KEY_TILE
    keys, values = kv.read(span, low, high)
    tiles = _tiles(q_TND, attention.kv_heads)
    positions = torch.arange(tiles.shape[0] * ROW_TILE, device=q_TND.device) + span.start
    positions = positions.view(-1, 1, ROW_TILE, 1)
    group = attention.heads // attention.kv_heads
    maximum = torch.full((*tiles.shape[:3], 1), NOTHING, device=q_TND.device)
    total = torch.zeros_like(maximum)
    mixed = torch.zeros_like(tiles)
    for start in range(low, high, KEY_TILE):
        k_GDS = keys[start - low : start - low + KEY_TILE].permute(1, 2, 0)
        v_GSD = values[start - low : start - low + KEY_TILE].transpose(0, 1)
        scores = _products(tiles, k_GDS) * attention.scale
        places = torch.arange(start, start + KEY_TILE, device=q_TND.device)
        seen = (places <= positions) & (places > positions - window)
        scores = scores.masked_fill(~seen.repeat_interleave(group, dim=2), float("-inf"))
        peak = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - peak)
        fade = torch.exp(maximum - peak)
        total = total * fade + weights.sum(-1, keepdim=True)
        mixed = mixed * fade + _products(weights, v_GSD)
        maximum = peak
    return _untile(mixed / total, attention)[: span.count]


def _attend_whole(
    q_TND: Tensor, attention: AttentionSpec, window: int, span: Span, kv: KV
) -> Tensor:
    low, high = max(0, span.start - window + 1), span.start + span.count
    group = attention.heads // attention.kv_heads
    keys, values = (part.repeat_interleave(group, dim=1) for part in kv.read(span, low, high))
    scores = torch.einsum("tnd,snd->nts", q_TND, keys) * attention.scale
    positions = torch.arange(span.start, high, device=q_TND.device)[:, None]
    places = torch.arange(low, high, device=q_TND.device)
    seen = (places <= positions) & (places > positions - window)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("nts,snd->tnd", weights, values)


def _products(tiles_BGTX: Tensor, right_GXY: Tensor) -> Tensor:
    """[B, G, T, Y]: one product of one shape per tile and head group."""
    return torch.matmul(tiles_BGTX, right_GXY)


def _tiles(q_TND: Tensor, kv_heads: int) -> Tensor:
    """[B, G, ROW_TILE * N / G, D]: padded tiles; rows of a head group lie together."""
    rows, heads, dim = q_TND.shape
    padded = functional.pad(q_TND, (0, 0, 0, 0, 0, -rows % ROW_TILE))
    tiles = padded.view(-1, ROW_TILE, kv_heads, heads // kv_heads, dim)
    return tiles.transpose(1, 2).reshape(tiles.shape[0], kv_heads, -1, dim)


def _untile(mixed: Tensor, attention: AttentionSpec) -> Tensor:
    group = attention.heads // attention.kv_heads
    rows = mixed.view(mixed.shape[0], attention.kv_heads, ROW_TILE, group, -1)
    return rows.transpose(1, 2).reshape(-1, attention.heads, attention.head_dim)
