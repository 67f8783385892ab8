"""int8 by rows with columns left out: the weights of bitsandbytes' LLM.int8.

A row is int8 under one f32, its largest magnitude. A few input channels of large models carry
activations far above the rest; their columns are kept in fp16 and take no part in the scale. The
paper found at most seven such channels, so a row has room for eight, and names them itself:

    largest f32 | columns int32 [8], -1 if unused | their weights fp16 [8] | K int8
    int8 * largest / 127, and the fp16 weights in their columns

What it is not: the mixed product of LLM.int8, which rounds activations too and chooses the columns
anew for every input. Here they are chosen once, from the importance of the channels.
Sources: Dettmers et al. 2022; bitsandbytes 0.50 (its checkpoints have no columns left out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfbyte.numerics.packing import read_as, read_half, write_half
from halfbyte.numerics.scales import inverse

KEPT = 8
HEADER = 52
STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def decode_int8(rows: Tensor, width: int) -> Tensor:
    """Rows of bytes -> f32 [n, width]."""
    head, integers = rows.split([HEADER, width], dim=1)
    largest, columns = read_as(head[:, :4], torch.float32), read_as(head[:, 4:36], torch.int32)
    kept = read_half(head[:, 36:])
    weights = torch.empty(len(rows), width + 1, device=rows.device)  # the last takes the unused
    weights[:, :width] = integers.view(torch.int8).float().mul_(largest).mul_(STEP)
    used = (columns >= 0) & (columns < width)
    weights.scatter_(1, torch.where(used, columns, width).long(), kept)
    return weights[:, :width]


def encode_int8(weight: Tensor, importance: Tensor | None) -> Tensor:
    """f32 [N, K] -> rows of bytes; the columns of greatest importance [K] are kept in fp16."""
    if importance is None:
        return _rows_of(weight, torch.tensor([], dtype=torch.int64, device=weight.device))
    return _rows_of(weight, importance.topk(min(KEPT, weight.shape[1])).indices.sort().values)


def rows_of(integers: Tensor, largest: Tensor) -> Tensor:
    """The rows of the tensors that bitsandbytes stores: int8 [N, K], and f32 [N]."""
    none = largest.new_empty(len(largest), 0)
    return _joined(largest[:, None], integers, none[0].int(), none)


def _rows_of(weight: Tensor, columns: Tensor) -> Tensor:
    rest = weight.index_fill(1, columns, 0.0)
    largest = rest.abs().amax(dim=1, keepdim=True)
    integers = (rest * (127.0 * inverse(largest))).round_().to(torch.int8)
    return _joined(largest, integers, columns.int(), weight[:, columns])


def _joined(largest: Tensor, integers: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """Bytes of: f32 [N, 1], int8 [N, K], int32 [n] up to `KEPT`, f32 [N, n]."""
    rows, count = kept.shape
    named = torch.full((rows, KEPT), -1, dtype=torch.int32, device=kept.device)
    weights = torch.zeros((rows, KEPT), device=kept.device)
    named[:, :count], weights[:, :count] = columns, kept
    head = [largest.view(torch.uint8), named.view(torch.uint8), write_half(weights)]
    return torch.cat([*head, integers.view(torch.uint8)], dim=1)
