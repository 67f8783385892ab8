"""What an error of the embedding costs, where it takes tokens in and where it is the head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from halfbyte.kernels.contract import Rows
from halfbyte.quantizer.block import Block
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import Passed
from halfbyte.specs import ModelSpec


class Ends:
    """The visitor of a walk that gathers second moments at the two ends of a model.

    For an error e of the row of a token with probability p, the divergence is about p / 2 times
    e^T H e, where H [H, H] is that of the final states at the head, and that of the gradients
    (times the square of the embeddings' scale) at the entry. So the two add up in a tied table; and
    p scales the cost of a whole row, so that one H serves all rows.
    """

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._spec = spec
        self._final = SecondMoment(spec.hidden, device)
        self._entry = SecondMoment(spec.hidden, device)

    @property
    def hessian(self) -> Tensor:
        """Of the embedding table."""
        entry = self._entry.mean * self._spec.embed_scale**2
        return entry + self._final.mean if self._spec.tied_head else entry

    def top(self, states: Tensor, probabilities: Tensor) -> None:
        self._final.add(states)

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        pass

    def entry(self, rows: Rows, gradient: Tensor) -> None:
        self._entry.add(gradient)
