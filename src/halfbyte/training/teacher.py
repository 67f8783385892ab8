"""The original model's predictions, ready for a student: final states on disk, and the head.

The original reads every window once (`evals/reference.py` keeps what comes out); its logits are
made again from the states, a few rows at a time, exactly and over the whole vocabulary. So it is
out of memory while a student learns, and windows that are seen again cost it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from halfbyte.evals.reference import Baseline, Floats, Reference
from halfbyte.evals.texts import Window
from halfbyte.formats.progress import Progress
from halfbyte.training.divergence import Logits
from halfbyte.training.heads import StoredHead
from halfbyte.training.samples import Samples


def taught(
    reference: Reference, samples: Sequence[Samples], progress: Progress | None = None
) -> list[Teacher]:
    """What the original makes of the windows of each."""
    windows = [
        [Window(token_ids=ids, first=0) for ids in some.token_ids.tolist()] for some in samples
    ]
    found = reference.read(windows, progress)
    return [Teacher(baseline, some.length) for baseline, some in zip(found, samples, strict=True)]


class Teacher:
    """The predictions for some windows of `length` rows."""

    def __init__(self, baseline: Baseline, length: int) -> None:
        self._states, self._length = baseline.states, length
        self._head = StoredHead(baseline.head, baseline.device)
        self._device, self._softcap = baseline.device, baseline.spec.logit_softcap

    def of(self, index: Sequence[int]) -> Logits:
        """The logits of the rows of some windows, one after the other."""
        states = torch.from_numpy(np.concatenate([self._window(i) for i in index]))
        states = states.to(self._device)

        def logits(start: int, stop: int) -> Tensor:
            z = self._head.product(states[start:stop])
            if self._softcap is None:
                return z
            return z.div_(self._softcap).tanh_().mul_(self._softcap)

        return logits

    def _window(self, index: int) -> Floats:
        return self._states[index * self._length : (index + 1) * self._length]
