"""AdamW: steps of about one rate in every number, whatever its gradient's size; weights decay.

All that it remembers are two named tensors for each parameter, so a checkpoint of it is a list of
arrays. Vectors (norms, scales) do not decay.
Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """`rates` multiply the rate of single parameters, by name."""

    parameters: Mapping[str, Tensor]
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-12
    decay: float = 0.0
    rates: Mapping[str, float] = field(default_factory=dict[str, float])
    state: dict[str, Tensor] = field(default_factory=dict[str, Tensor], init=False)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters.items():
            for moment in ("mean", "square"):
                self.state[f"{name}.{moment}"] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, index: int, rate: float) -> None:
        """Moves the parameters that have a gradient; `index` is the step, from 0 on."""
        first, second = self.betas
        unbias = (1 - second ** (index + 1)) ** 0.5
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            mean, square = self.state[f"{name}.mean"], self.state[f"{name}.square"]
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            own = rate * self.rates.get(name, 1.0)
            if parameter.dim() > 1:
                parameter.mul_(1 - own * self.decay)
            spread = square.sqrt().div_(unbias).add_(self.eps)
            parameter.addcdiv_(mean, spread, value=-own / (1 - first ** (index + 1)))
