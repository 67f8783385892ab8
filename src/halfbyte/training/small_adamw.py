"""AdamW in a fraction of the memory: what it remembers in 8 bits, the parameters in bf16 if wished.

Means and squares are kept as one byte each, under one f32 for every 256 of them: the square root of
a mean's share of the largest, the fourth root of a square's, so that small ones keep their digits.
A parameter in bf16 is rounded up or down by chance, in proportion: a rate of a thousandth would
else move nothing. The chance is a function of the seed, the step and the parameter's place in the
order. Numbers are worked through a slab at a time.

Source: Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization" (whose table of codes
is another); stochastic rounding: Gupta et al. 2015.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
SLAB = 1 << 22  # numbers at once; a few f32 temporaries of this size exist
MEAN, SQUARE = 127, 255  # the largest codes
TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallAdamW:
    """Without decay. `rates` multiply the rate of single parameters, by name."""

    parameters: Mapping[str, Tensor]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            blocks = -(-parameter.numel() // BLOCK)
            for part, kind in (("mean", torch.int8), ("square", torch.uint8)):
                shape, device = (blocks, BLOCK), parameter.device
                self.state[f"{name}.{part}"] = torch.zeros(shape, dtype=kind, device=device)
                self.state[f"{name}.{part}.scale"] = torch.zeros((blocks, 1), device=device)

    @torch.no_grad()
    def step(self, index: int, rate: float) -> None:
        """Moves the parameters that have a gradient; `index` is the step, from 0 on."""
        for place, (name, parameter) in enumerate(self.parameters.items()):
            if parameter.grad is not None:
                chance = torch.Generator(parameter.device)
                chance.manual_seed((self.seed * 1_000_003 + index) * 100_003 + place)
                own = rate * self.rates.get(name, 1.0)
                flat, gradient = parameter.view(-1), parameter.grad.reshape(-1)
                for start in range(0, len(flat), SLAB):
                    part = slice(start, start + SLAB)
                    change = self._change(name, gradient[part], start, index)
                    _move(flat[part], change.mul_(-own), chance)

    def _change(self, name: str, gradient: Tensor, start: int, index: int) -> Tensor:
        """Which way and how far, in rates; what is remembered follows."""
        blocks = slice(start // BLOCK, -(-(start + len(gradient)) // BLOCK))
        mean, square, mean_scale, square_scale = (
            self.state[f"{name}.{part}"][blocks]
            for part in ("mean", "square", "mean.scale", "square.scale")
        )
        first, second = self.betas
        fresh = functional.pad(gradient.float(), (0, -len(gradient) % BLOCK)).view(-1, BLOCK)
        root = mean.float().div_(MEAN)
        means = (root * root.abs()).mul_(mean_scale).lerp_(fresh, 1 - first)
        squares = square.float().div_(SQUARE).pow_(4).mul_(square_scale)
        squares.mul_(second).addcmul_(fresh, fresh, value=1 - second)
        _remember(means, mean, mean_scale, square, square_scale, squares)
        spread = squares.div_(1 - second ** (index + 1)).sqrt_().add_(self.eps)
        return means.div_(spread).div_(1 - first ** (index + 1)).view(-1)[: len(gradient)]


def _remember(
    means: Tensor,
    mean: Tensor,
    mean_scale: Tensor,
    square: Tensor,
    square_scale: Tensor,
    squares: Tensor,
) -> None:
    mean_scale.copy_(means.abs().amax(1, keepdim=True))
    square_scale.copy_(squares.amax(1, keepdim=True))
    share = means / mean_scale.clamp(min=TINY)
    mean.copy_(share.abs().sqrt_().copysign_(share).mul_(MEAN).round_())
    share = squares / square_scale.clamp(min=TINY)
    square.copy_(share.pow_(0.25).mul_(SQUARE).ceil_().clamp_(max=SQUARE))


def _move(parameter: Tensor, change: Tensor, chance: torch.Generator) -> None:
    if parameter.dtype != torch.bfloat16:
        parameter.add_(change)
        return
    bits = change.add_(parameter).view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=chance
    )
    rounded = bits.add_(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    parameter.copy_(rounded)
