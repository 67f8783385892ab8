"""The task of a drafter: to say what its target would, several tokens ahead.

Every step takes a group of passages with about as many rows. At first only the first draft is
learned, which all others stand on; then whole rounds. What is held out are the target's greedy
answers: the measure is how many drafts of a round would have been wrong there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import InvalidInputError
from halfbyte.kernels.reference.ops import ReferenceOps, Weight
from halfbyte.models.decoder import Decoder
from halfbyte.models.drafter import DraftModel
from halfbyte.models.load import assembled_drafter
from halfbyte.numerics.codec import decode, encode
from halfbyte.specs import SCHEMES, ModelSpec
from halfbyte.training.acceptance import Judged
from halfbyte.training.loop import Learned
from halfbyte.training.order import Order
from halfbyte.training.passages import Passage
from halfbyte.training.rounds import Windows, rounds
from halfbyte.training.seen import Seen

PREDICTED = 1 << 26  # numbers of a batch's predictions: 256 MiB of f32
HELD_OUT_ROWS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Teaching:
    """How drafts are taught: `length` of a round, `rows` of a step, of `steps` in all.

    The first `alone` of all steps teach the first draft alone. Draft k counts `fade ** (k - 1)`
    times how likely it is reached, at least `least`.
    """

    steps: int
    length: int = 4
    rows: int = 1024
    alone: float = 0.3
    fade: float = 0.8
    least: float = 0.1
    seed: int = 0

    def drafts(self, step: int) -> int:
        return 1 if step < self.alone * self.steps else self.length


class DraftTask:
    """Teaches `weights` (f32, by our names, on the target's device) to draft for `target`.

    `head_fixed`: the head stays as it is. `passages` are what `seen` has seen, `held_out` the
    indices of those that are only measured.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        target: Decoder,
        passages: Sequence[Passage],
        seen: Seen,
        *,
        held_out: Sequence[int],
        head_fixed: bool,
        teaching: Teaching,
    ) -> None:
        assert isinstance(target.ops, ReferenceOps)
        self._device = target.ops.device
        self._weights = {
            name: weight.to(self._device).requires_grad_(
                not name.endswith(".tokens") and not (name == "head.weight" and head_fixed)
            )
            for name, weight in weights.items()
        }
        self.parameters: Mapping[str, Tensor] = {
            name: weight for name, weight in self._weights.items() if weight.requires_grad
        }
        self._model = _model(spec, self._weights, target)
        tokens = self._weights.get("head.tokens")
        self._tokens = None if tokens is None else tokens.long()
        self._target_head = _dense(target.weights.head, self._device)
        self._softcap = target.spec.logit_softcap
        self._passages, self._seen, self._teaching = passages, seen, teaching
        self._held_out = held_out
        apart = set(held_out)
        learned = [index for index in range(len(passages)) if index not in apart]
        self._groups = [*self._grouped(learned)]
        if not self._groups:
            raise InvalidInputError("there is nothing to learn from", hint="more --data")
        self._order = Order(count=len(self._groups), batch=1, seed=teaching.seed)

    @property
    def rows(self) -> int:
        """Of one pass over everything."""
        return sum(self._passages[index].learned for group in self._groups for index in group)

    def copied(self) -> dict[str, Tensor]:
        """All weights, as they are now."""
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Other weights in place of those that were learned."""
        for name, weight in self._weights.items():
            weight.copy_(weights[name])

    def learn(self, step: int) -> Learned:
        (number,) = self._order.of(step)
        group, length = self._groups[number], self._teaching.drafts(step)
        rows = sum(self._passages[index].learned for index in group)
        total = 0.0
        for some in self._fitting(group):
            judged = self._judged(some, length)
            loss = torch.stack([it.loss for it in judged]).sum() / rows
            loss.backward()
            total += loss.item()
        return Learned(total, rows)

    @torch.no_grad()
    def measure(self) -> float:
        """How many drafts of a round are wrong, of the target's greedy answers held out."""
        return self._teaching.length - sum(self.accepted())

    @torch.no_grad()
    def accepted(self) -> list[float]:
        """Of all rounds on what is held out, how often the first draft would be right, the second
        with it, ..."""
        right = [0.0] * self._teaching.length
        rounds = 0
        for some in self._fitting(self._held_out):
            judged = self._judged(some, self._teaching.length)
            rounds += len(judged[0].right)
            for place, count in enumerate(_right_so_far(judged, self._inside(some))):
                right[place] += count
        return [count / max(1, rounds) for count in right]

    def _inside(self, indices: Sequence[int]) -> list[Tensor]:
        """For every step after the first: which rows of the step before go on."""
        left = torch.cat(
            [torch.arange(self._passages[index].learned - 1, 0, -1) for index in indices]
        ).to(self._device)
        found: list[Tensor] = []
        for step in range(1, self._teaching.length):
            found.append(left > step)
            left = left[left > step]
        return found

    def _judged(self, indices: Sequence[int], length: int) -> list[Judged]:
        passages = [self._passages[index] for index in indices]
        windows = Windows(
            passages,
            [self._seen.window(index) for index in indices],
            self._target_head,
            self._softcap,
            self._device,
        )
        return rounds(
            self._model,
            self._weights["head.weight"],
            windows,
            steps=length,
            fade=self._teaching.fade,
            least=self._teaching.least,
            tokens=self._tokens,
        )

    def _grouped(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """Passages in groups of about the wanted rows, drawn by the seed; a rest is dropped unless
        it is all there is."""
        chance = torch.Generator().manual_seed(self._teaching.seed)
        group: list[int] = []
        rows, any_yet = 0, False
        for place in torch.randperm(len(indices), generator=chance).tolist():
            index = indices[place]
            group.append(index)
            rows += self._passages[index].learned
            if rows >= self._teaching.rows:
                yield group
                group, rows, any_yet = [], 0, True
        if group and not any_yet:
            yield group

    def _fitting(self, indices: Sequence[int]) -> Iterator[list[int]]:
        """The passages of a group, as many at once as have room for what is predicted of them."""
        most = max(1, PREDICTED // self._target_head.shape[0])
        some: list[int] = []
        rows = 0
        for index in indices:
            count = self._passages[index].learned + 1
            if some and rows + count > most:
                yield some
                some, rows = [], 0
            some.append(index)
            rows += count
        if some:
            yield some


def _right_so_far(judged: Sequence[Judged], inside: Sequence[Tensor]) -> Iterator[float]:
    """Of all rounds: how many were right in all drafts up to each."""
    right = judged[0].right
    yield float(right.sum())
    for step, going in zip(judged[1:], inside, strict=False):
        right = right[going] & step.right
        yield float(right.sum())


def _model(spec: ModelSpec, weights: Mapping[str, Tensor], target: Decoder) -> DraftModel:
    """The drafter over these very tensors: what is learned is what runs."""
    packed = {
        name: Weight(encode(weight.detach().cpu(), SCHEMES["f32"]), weight)
        for name, weight in weights.items()
        if not name.endswith(".tokens")
    }
    return assembled_drafter(spec, packed, target)


def _dense(weight: Weight, device: str) -> Tensor:
    return decode(weight.stored, device=device) if weight.dense is None else weight.dense


def held_out(passages: Sequence[Passage], rows: int = HELD_OUT_ROWS) -> list[int]:
    """The indices of greedy answers to measure on: some from all over, at most a tenth of them."""
    greedy = [index for index, it in enumerate(passages) if it.greedy and it.learned > 2]
    total = sum(passages[index].learned for index in greedy)
    every = max(10, total // max(1, rows))
    return greedy[::every] or greedy[:1]
