"""Rotary position embedding in the half-split layout: pair i is (i, i + D/2).

Angles are computed in f32 as the trained models saw them (Su et al., arXiv 2104.09864).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from halfbyte.specs import RopeSpec


@lru_cache(maxsize=64)
def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """[D / 2] f32: the angle of each pair per position; 0 where the divisor is infinite."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency = 1.0 / (rope.theta**exponents)
    if rope.divisors is None:
        return frequency
    return frequency / torch.tensor(rope.divisors, dtype=torch.float32)


def rotation(positions_R: Tensor, rope: RopeSpec, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [R, 1, D / 2] of every position and pair."""
    frequency = frequencies(rope, head_dim).to(positions_R.device)
    angle = positions_R.to(torch.float32)[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_RND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of every head, rotated by the row's angles."""
    first, second = x_RND.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
