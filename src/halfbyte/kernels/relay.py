"""Two steps as one: the states that the first computes are what the second goes on from.

Where a card is too small for a model, its first layers run on the CPU and the others on the card.
Each part is a step of its own op set, recorded, replayed and kept deterministic as ever; what is
handed over are f32 numbers of every row, once in a forward, so nothing is rounded on the way. The
two take turns: a row's layers come one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.kernels.contract import Choice, Choosing, Draw, OpSet, Preparing, Rows, Step


@dataclass(frozen=True, slots=True)
class Front:
    """An op set for the embeddings of a model, and its layers up to the last `card_layers`."""

    ops: OpSet
    card_layers: int


@dataclass(frozen=True, slots=True)
class Relay:
    """`back` after `front`; tokens are chosen where the back can."""

    front: Step
    back: Step

    def __call__(self, rows: Rows, wanted: Sequence[int]) -> Sequence[np.ndarray]:
        return self.back(self._handed_on(rows), wanted)

    def able(self, draws: Sequence[Draw]) -> bool:
        return isinstance(self.back, Choosing) and self.back.able(draws)

    def choose(
        self, rows: Rows, wanted: Sequence[int], draws: Sequence[Draw], *, states: bool
    ) -> Choice:
        assert isinstance(self.back, Choosing), "this step chooses nothing"
        return self.back.choose(self._handed_on(rows), wanted, draws, states=states)

    def prepare(self, rows: int, wanted: int, spans: int) -> None:
        for step in (self.front, self.back):
            if isinstance(step, Preparing):
                step.prepare(rows, wanted, spans)

    def _handed_on(self, rows: Rows) -> Rows:
        return replace(rows, states=self.front(rows, ())[0].copy())
