"""What an error of an embedding costs, where it takes tokens in and where it is the head.

For an error e of the row of one token, the divergence is about p / 2 times e^T H e: with H [H, H]
the second moment of the final states and p how probable the token is, at the head; with H that of
the gradients (times the square of the embeddings' scale) and p how often it is read, at the entry.
Both probabilities are much alike, so that in a tied table the two H add up, and as p scales the
cost of a whole row, one H serves all rows. It is damped far more than that of a layer, for it
serves the rows of tokens, too, that calibration hardly saw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.contract import Rows
from halfbyte.quantizer.block import Block
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import Passed
from halfbyte.specs import ModelSpec

DAMPING = 0.5  # of the mean diagonal


class Ends:
    """The visitor of a walk that looks at the two ends of a model."""

    def __init__(self, spec: ModelSpec, device: str) -> None:
        self._spec = spec
        self._final = SecondMoment(spec.hidden, device)
        self._entry = SecondMoment(spec.hidden, device)
        self._predicted = torch.zeros(spec.vocab, device=device)
        self._read = torch.zeros(spec.vocab, device=device)

    @property
    def hessian(self) -> Tensor:
        """By which the rows of the embedding are solved [H, H]."""
        return damped(self.entry + self.final if self._spec.tied_head else self.entry, DAMPING)

    @property
    def final(self) -> Tensor:
        return self._final.mean

    @property
    def entry(self) -> Tensor:
        return self._entry.mean * self._spec.embed_scale**2

    @property
    def predicted(self) -> Tensor:
        """The mean of p (1 - p) of every token [V]: how far its logit moves the prediction."""
        return self._predicted / self._final.rows

    @property
    def read(self) -> Tensor:
        """How often every token was read [V]; they sum to one."""
        return self._read / self._entry.rows

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        self._final.add(states)
        self._predicted += (probabilities * (1 - probabilities)).sum(0)

    def behind(self, block: Block, gradient: Tensor) -> None:
        pass

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        pass

    def left(self, block: Block) -> None:
        pass

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        self._entry.add(gradient)
        ids = torch.tensor(rows.token_ids, device=self._read.device)
        self._read += torch.bincount(ids, minlength=len(self._read))
