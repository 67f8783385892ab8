"""Factors of channels, folded into what makes the channels: nothing changes but the rounding.

The columns of weights are multiplied by factors, and the norm or the rows of the weight before them
divided by the same. This is possible where nothing else reads those channels: the inputs of q, k
and v, of gate and up (a norm's weight, before or between other norms or alone), and of down (the
rows of up, which the activated gate only scales). It is not done for o, whose inputs several heads
share, for experts, and for inputs that come straight from the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from halfbyte.quantizer.block import ATTENTION_IN, DOWN, FEED_FORWARD_IN, Group


@dataclass(frozen=True, slots=True)
class Fold:
    """The weights of `group` read what `producer` makes."""

    group: Group
    producer: str


FOLDS = (Fold(ATTENTION_IN, "attn_norm"), Fold(FEED_FORWARD_IN, "mlp_norm"), Fold(DOWN, "mlp.up"))


def fold(tensors: Mapping[str, Tensor], layer: str, at: Fold, factors: Tensor) -> dict[str, Tensor]:
    """What takes the place of some tensors of a layer ("layers.3") when `factors` [K] are folded.

    `tensors` by our names, f32.
    """
    readers = [f"{layer}.{part}.weight" for part in at.group.parts]
    makers = [f"{layer}.{at.producer}.{kind}" for kind in ("weight", "bias")]
    scaled = {name: tensors[name] * factors for name in readers if name in tensors}
    divided = {name: _rows_divided(tensors[name], factors) for name in makers if name in tensors}
    return scaled | divided


def _rows_divided(tensor: Tensor, factors: Tensor) -> Tensor:
    return tensor / (factors if tensor.ndim == 1 else factors[:, None])
