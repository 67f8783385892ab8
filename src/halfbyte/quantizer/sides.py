"""What a walk back tells of a weight: the second moments of its two sides.

Those are its inputs, and the gradients at its outputs; each token counts as much as its other side
is large, so that one whose output nothing hangs on says little of the inputs. Together they are the
Kronecker approximation of what errors cost (`yaqa.py`), the first step of its power iteration.
Source: Tseng et al. 2025, "Model-preserving adaptive rounding" (arXiv 2505.22988).
"""

from __future__ import annotations

from torch import Tensor

from halfbyte.quantizer.block import BORROWED
from halfbyte.quantizer.moment import SecondMoment, drawn_together
from halfbyte.quantizer.observed import Passed


class BothSides:
    """The sides of some weights, by name, as products with them pass."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._found: dict[str, list[_Sides]] = {}  # by experts, one where there are none

    def add(self, name: str, product: Passed, gradient: Tensor, *, outputs: bool = True) -> None:
        """A product with a weight, and the gradient [R, N] at what came out of it.

        Without `outputs` of the inputs alone, for a weight from its first product to its last.
        """
        if name not in self._found:
            q = product.weight.stored
            count = q.shape[0] if len(q.shape) > 2 else 1
            rows = q.num_rows // count if outputs else None
            self._found[name] = [_Sides(q.width, rows, self._device) for _ in range(count)]
        self._found[name][product.expert or 0].add(product.input, gradient)

    def taken(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The means [E, K, K] and [E, N, N] of a weight, of which nothing is kept here."""
        sides = self._found.pop(name)
        outputs = [side.outputs for side in sides if side.outputs is not None]
        inputs = drawn_together([side.inputs for side in sides], BORROWED)
        return inputs, drawn_together(outputs, BORROWED) if outputs else None

    @property
    def names(self) -> list[str]:
        return [*self._found]


class _Sides:
    """Both second moments of one matrix."""

    def __init__(self, width: int, rows: int | None, device: str) -> None:
        self.inputs = SecondMoment(width, device)
        self.outputs = None if rows is None else SecondMoment(rows, device)

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Inputs [R, K] and gradients at the outputs [R, N]."""
        self.inputs.add(x, gradient.square().sum(-1))
        if self.outputs is not None:
            self.outputs.add(gradient, x.square().sum(-1))
