"""An adapter that is trained beside a model that stays as it is stored, to the bit.

The rows of a linear get `scale * B @ A` of their inputs added, in f32 and unrounded, which is what
a runtime does with an adapter that is kept apart. Begun as PEFT begins: A at random, B zero, so
that it changes nothing yet. A layer's weights are decoded as it is come to, without gradients.

What it is not: an update inside the rounding (`grid.py`), which ends in other integers.
Source: Hu et al. 2021, "LoRA"; Dettmers et al. 2023, "QLoRA" (on a body of four bits).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from halfbyte.kernels.contract import LowRank
from halfbyte.numerics.codec import encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, LowRankSpec
from halfbyte.training.student import Tensors

A, B = "lora_a", "lora_b"


class Adapted(Tensors):
    """The tensors of a model as they are stored, with updates beside some linears that learn.

    `seed` draws what they start from.
    """

    def __init__(
        self,
        stored: Mapping[str, QTensor],
        updates: Sequence[LowRankSpec],
        device: str,
        *,
        seed: int,
    ) -> None:
        super().__init__(stored, {})
        chance = torch.Generator().manual_seed(seed)
        self._parts = {it.weight: _begun(it, chance, device) for it in updates}
        self.updates = {
            it.weight: (LowRank(a=a, b=b, scale=it.scale),)
            for it, (a, b) in zip(updates, self._parts.values(), strict=True)
        }

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{weight}.{part}": leaf
            for weight, leaves in self._parts.items()
            for part, leaf in zip((A, B), leaves, strict=True)
        }

    @property
    def rates(self) -> dict[str, float]:
        return dict.fromkeys(self.parameters, 1.0)

    def pairs(self) -> Iterator[tuple[str, tuple[QTensor, QTensor]]]:
        """A and B of each weight, in f32."""
        for weight, leaves in self._parts.items():
            a, b = (encode(leaf.detach().cpu(), SCHEMES["f32"]) for leaf in leaves)
            yield weight, (a, b)


def _begun(update: LowRankSpec, chance: torch.Generator, device: str) -> tuple[Tensor, Tensor]:
    shape, other = update.shapes
    bound = update.inputs**-0.5
    a = torch.empty(shape).uniform_(-bound, bound, generator=chance)
    return a.to(device).requires_grad_(), torch.zeros(other, device=device).requires_grad_()
