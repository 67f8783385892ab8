"""The ways to train a model on its grid, as the weights that each makes trainable.

`full`: every weight, step and vector, all at once. `blockwise`: the same of a layer at a time.
`lora`: a change of low rank inside the rounding, the steps and the vectors. `scales`: the steps and
the vectors alone; the integers stay those of the start. `adapter`: nothing of the model, but an
adapter beside it (`low_rank.py`). Tables (an embedding, a head) are trained in `full` only, and
stay as they are stored in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import LowRankSpec
from halfbyte.training.adamw import AdamW
from halfbyte.training.fisher import Known
from halfbyte.training.grid import DOWN, PLACE, STEP, UP, OnGrid, Places, Steps, Updates, trainable
from halfbyte.training.loop import Optimizer
from halfbyte.training.low_rank import A, Adapted, B
from halfbyte.training.small_adamw import SmallAdamW
from halfbyte.training.student import TABLES, VALUE, Tensors, Vector

Mode = Literal["full", "blockwise", "lora", "scales", "adapter"]
MODES: tuple[Mode, ...] = get_args(Mode)
NOTHING: Mapping[str, Known] = {}
FOUR_BITS = ("q4_0", "int4", "uint4")  # whose places bf16 tells apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How far one step moves: a place, in steps of the grid; a step or a number of a vector, in
    parts of its tensor's mean; a factor of a low-rank update; a number of an adapter. What is
    `held` (`fisher.py`) may move further."""

    places: float = 0.002
    held_places: float = 0.01
    steps: float = 0.0004
    vectors: float = 0.0004
    updates: float = 0.0015
    held_updates: float = 0.004
    adapter: float = 0.001

    @staticmethod
    def given(*, places: float | None = None, scales: float | None = None) -> Rates:
        """The usual ones, but for what is given; `scales` are those of steps and of vectors."""
        usual = Rates()
        return Rates(
            places=usual.places if places is None else places,
            held_places=usual.held_places if places is None else places,
            updates=usual.updates if places is None else places,
            held_updates=usual.held_updates if places is None else places,
            adapter=usual.adapter if places is None else places,
            steps=usual.steps if scales is None else scales,
            vectors=usual.vectors if scales is None else scales,
        )

    def holding(self) -> Rates:
        """Of a training whose places are held."""
        return replace(self, places=self.held_places, updates=self.held_updates)

    def of(self, name: str) -> float:
        """The rate of a parameter, by its name's end."""
        return {
            PLACE: self.places,
            STEP: self.steps,
            VALUE: self.vectors,
            UP: self.updates,
            DOWN: self.updates,
            A: self.adapter,
            B: self.adapter,
        }[name.rpartition(".")[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """How tensors are trained: the mode, where, the rank of updates, and whether in little memory
    (8-bit states, places in bf16). `adapter` is what an adapter changes."""

    mode: Mode
    device: str = "cpu"
    rank: int = 16
    small: bool = False
    seed: int = 0
    rates: Rates = Rates()
    adapter: Sequence[LowRankSpec] = ()

    def tensors(
        self,
        original: Callable[[str], QTensor],
        start: Mapping[str, QTensor],
        known: Mapping[str, Known] = NOTHING,
    ) -> Tensors:
        """The tensors of `start`, with what is trained of them; `original` by name.

        Of what is `known` places begin at rest.
        """
        if self.mode == "adapter":
            return Adapted(start, self.adapter, self.device, seed=self.seed)
        found: dict[str, OnGrid] = {}
        for number, (name, q) in enumerate(start.items()):
            made = self._trained(name, q, original, number, known.get(name))
            if made is not None:
                found[name] = made
        return Tensors(start, found)

    def optimizer(self, tensors: Tensors) -> Optimizer:
        """With the rates of every parameter; the schedule's rate is a factor."""
        rates = {name: size * self.rates.of(name) for name, size in tensors.rates.items()}
        if self.small:
            return SmallAdamW(parameters=tensors.parameters, rates=rates, seed=self.seed)
        return AdamW(parameters=tensors.parameters, rates=rates)

    def _trained(
        self,
        name: str,
        q: QTensor,
        original: Callable[[str], QTensor],
        number: int,
        known: Known | None,
    ) -> OnGrid | None:
        if len(q.shape) == 1:
            return Vector(q, self.device) if q.scheme.name == "f32" else None
        if not trainable(q.scheme) or (name in TABLES and self.mode != "full"):
            return None
        if self.mode == "scales":
            return Steps(q, self.device)
        before = decode(original(name), device=self.device)
        if known is not None:
            before = decode(q, device=self.device).add_(known.shift.view(before.shape))
        if self.mode == "lora":
            seed = self.seed * 1_000_003 + number
            return Updates(q, before, self.device, rank=self.rank, seed=seed)
        rough = self.small and q.scheme.name.startswith(FOUR_BITS)
        return Places(q, before, self.device, kept=torch.bfloat16 if rough else torch.float32)
