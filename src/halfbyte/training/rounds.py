"""Rounds of drafts at all positions of a few windows at once, with gradients.

A row is a place where a round could begin: the target has computed the positions up to `i`, and has
chosen the token `i + 1`. All steps of the round stand at `i` and see the keys up to it; step `k`
takes the token `i + k` and the state that the step before gave (the first: the target's own), and
is judged by what the target makes of position `i + k`. A wrong draft ends a round, so the tokens
that later steps are given are those that the target chose, the states are the drafter's own, and a
step counts by how likely it is reached.

The drafter is the very graph that runs (`models/drafter.py`), on the reference op set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.contract import Rows, Span
from halfbyte.models.drafter import DraftModel
from halfbyte.training.acceptance import Judged, judge
from halfbyte.training.passages import Passage
from halfbyte.training.seen import Window

PIECE = 128  # rows that look at keys together: the last of them bounds what all read


class Keys:
    """The keys and values of one layer in all windows; a span's `ring` is the window it is in."""

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._parts = parts

    def read(self, span: Span, low: int, high: int) -> tuple[Tensor, Tensor]:
        keys, values = self._parts[span.ring]
        return keys[low:high], values[low:high]


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Rows of a step: `window` and position `at` of each, in order, on the device."""

    window: Tensor
    at: Tensor

    @classmethod
    def of(cls, passages: Sequence[Passage], device: str) -> Places:
        """Where rounds can begin: the last token computed, the next one chosen, one to draft."""
        counts = [range(it.first - 1, len(it.ids) - 2) for it in passages]
        window = [index for index, count in enumerate(counts) for _ in count]
        at = [position for count in counts for position in count]
        return cls(window=torch.tensor(window, device=device), at=torch.tensor(at, device=device))

    def taken(self, mask: Tensor) -> Places:
        return Places(window=self.window[mask], at=self.at[mask])

    def spans(self) -> list[Span]:
        """Neighbours together, as far as they are; up to PIECE of them."""
        found: list[Span] = []
        start, count, window = 0, 0, -1
        for its, at in zip(self.window.tolist(), self.at.tolist(), strict=True):
            if its == window and at == start + count and count < PIECE:
                count += 1
                continue
            if count:
                found.append(Span(start=start, count=count, pages=(), ring=window))
            start, count, window = at, 1, its
        return [*found, Span(start=start, count=count, pages=(), ring=window)] if count else found


class Windows:
    """Some windows on the device, and what the target predicts at every place of them."""

    def __init__(
        self,
        passages: Sequence[Passage],
        windows: Sequence[Window],
        head: Tensor,
        softcap: float | None,
        device: str,
    ) -> None:
        self.places = Places.of(passages, device)
        self.ends = torch.tensor([len(it.ids) for it in passages], device=device)
        # Rows are kept from where the first round of a window begins.
        firsts = [it.first - 1 for it in passages]
        counts = [len(it.ids) - first for it, first in zip(passages, firsts, strict=True)]
        starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
        self._shifts = (starts - torch.tensor(firsts)).to(device)
        ids = [
            token for it, first in zip(passages, firsts, strict=True) for token in it.ids[first:]
        ]
        self.ids = torch.tensor(ids, device=device)
        self.states = torch.cat(
            [it.states[first:].to(device) for it, first in zip(windows, firsts, strict=True)]
        )
        self._windows = windows
        self._device = device
        logits = self.states @ head.T
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        self.predicted = logits.softmax(-1)

    def rows(self, places: Places, after: int) -> Tensor:
        """Where what belongs to the positions `after` the places is kept."""
        return self._shifts[places.window] + places.at + after

    def keys(self, layer: int) -> Keys:
        device = self._device
        return Keys([tuple(part.to(device) for part in it.kept[layer]) for it in self._windows])  # type: ignore[misc]


def rounds(
    model: DraftModel,
    head: Tensor,
    windows: Windows,
    *,
    steps: int,
    fade: float,
    least: float,
    tokens: Tensor | None = None,
) -> list[Judged]:
    """The drafts of every round that begins in the windows, up to `steps` of each.

    Losses are sums over rows: step k counts `fade ** k` times how likely it is reached, at least
    `least`. The rows of later steps are fewer where a window ends.
    """
    caches = [windows.keys(index) for index in model.reads]
    places = windows.places
    states = windows.states[windows.rows(places, 0)]
    reached = torch.ones_like(places.at, dtype=torch.float32)
    found: list[Judged] = []
    for step in range(1, steps + 1):
        inside = places.at + step < windows.ends[places.window] - 1
        places, states, reached = places.taken(inside), states[inside], reached[inside]
        if not len(places.at):
            break
        row = windows.rows(places, step)
        rows = Rows(token_ids=windows.ids[row].tolist(), spans=places.spans(), states=states)
        own = model.states(rows, caches)
        weights = fade ** (step - 1) * reached.clamp(min=least)
        judged = judge(
            own, head, windows.predicted[row], windows.ids[row + 1], weights, tokens=tokens
        )
        found.append(judged)
        reached = reached * judged.survival
        if step < steps:
            states = model.handed_on(own)
    return found
