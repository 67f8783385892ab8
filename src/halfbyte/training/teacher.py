"""The original model's predictions, ready for a student: final states on disk, and the head.

The original reads every window once, many of them at a time and a layer at a time, as a student
does; its logits are made again from the states (`evals/reference.py`), a few rows at a time,
exactly and over the whole vocabulary. So it is out of memory while a student learns, and windows
that are seen again cost it nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from halfbyte.evals.reference import Floats, Stored, kept
from halfbyte.evals.texts import Window
from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.training.divergence import Logits
from halfbyte.training.heads import StoredHead
from halfbyte.training.ops import TrainingOps
from halfbyte.training.samples import Samples
from halfbyte.training.student import Student, Tensors

AT_ONCE = 2048  # tokens that the original reads at a time


def taught(
    source: Source,
    samples: Sequence[Samples],
    *,
    weights: str | None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Teacher]:
    """What the original makes of the windows of each; `weights` is a hash of its own, without which
    nothing is kept on disk."""
    spec = source.spec
    head = StoredHead(source.tensor(spec.head_name), device)
    found: list[Teacher] = []
    for some in samples:
        states = kept(
            [Window(token_ids=ids, first=0) for ids in some.token_ids.tolist()],
            spec.hidden,
            lambda windows: _states(source, windows, device, progress),
            key=None if weights is None else f"{weights} {AT_ONCE} at once",
        )
        found.append(Teacher(states, some.length, head, spec.logit_softcap))
    return found


@torch.no_grad()
def _states(
    source: Source, windows: Sequence[Window], device: str, progress: Progress | None
) -> Iterator[Floats]:
    """Of windows of one length, some at a time."""
    stored = {tensor.name: source.tensor(tensor.name) for tensor in source.spec.tensors()}
    original = Student(source.spec, Tensors(stored, {}), TrainingOps(device), again=False)
    count = max(1, AT_ONCE // len(windows[0].targets))
    for start in range(0, len(windows), count):
        some = windows[start : start + count]
        states, _ = original.states([window.token_ids[:-1] for window in some])
        yield states.cpu().numpy()
        if progress is not None:
            progress(start + len(some), len(windows))


class Teacher:
    """The predictions for some windows of `length` rows, from the states of all rows [R, H]."""

    def __init__(
        self, states: Floats | Stored, length: int, head: StoredHead, softcap: float | None
    ) -> None:
        self._states, self._length, self._head, self._softcap = states, length, head, softcap

    def states(self, index: Sequence[int]) -> Tensor:
        """The final states [R, H] of some windows, one after the other."""
        states = torch.from_numpy(np.concatenate([self._window(i) for i in index]))
        return states.to(self._head.device)

    def logits(self, states: Tensor) -> Logits:
        """What is predicted of final states."""

        def logits(start: int, stop: int) -> Tensor:
            z = self._head.product(states[start:stop])
            if self._softcap is None:
                return z
            return z.div_(self._softcap).tanh_().mul_(self._softcap)

        return logits

    def _window(self, index: int) -> Floats:
        return self._states[index * self._length : (index + 1) * self._length]
