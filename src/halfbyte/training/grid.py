"""Weights that are trained on the grid they ship on: their rounding is part of the forward pass.

A weight is `step * round(place)`: its place among the integers, and the step of its group. Forward,
the integers are rounded and the steps are as they will be stored, so that what a training sees is
bit for bit what a runtime decodes. Backward, both roundings are taken for the identity (the
straight-through estimator), and nothing pulls at a place beyond the last integer. Places are in
steps, not in weights: one learning rate suits every group of every model, and a step that changes
moves no integer.

Three ways to train, by what is a parameter. `Places`: every place and step. `Steps`: the steps; the
integers stay as they are, packed. `Updates`: the places are those of the start, kept to a sixteenth
of a step (the integer and four bits of what is left), plus a product of low rank; steps too.

What it is not: a choice of where to start; that is the best quantization there is without training.
Sources: Bengio et al. 2013 (straight-through); Esser et al. 2020, "Learned step size quantization"
(which moves the integers with the step); Bondarenko et al. 2024, "Low-rank quantization-aware
training" (the update inside the rounding).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.numerics.codec import integers_of, store
from halfbyte.numerics.grids import GRIDS, grid_of
from halfbyte.numerics.packing import read_nibbles, write_nibbles
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales, inverse
from halfbyte.specs import Scheme

# How far from its integer a weight starts at most: less than a half, so that it starts rounded as
# it was given.
EDGE = 0.42  # which bf16 keeps below a half at every integer of four bits
SIXTEENTHS = 16
PLACE, STEP, UP, DOWN = "place", "step", "up", "down"


class OnGrid(Protocol):
    """A weight on its grid. `parameters` are leaves with gradients."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def rates(self) -> Mapping[str, float]:
        """How large a parameter's numbers are: what a rate of one step means for it."""
        ...

    def weight(self) -> Tensor:
        """As it ships: f32 of the tensor's shape; gradients pass."""
        ...

    def stored(self) -> QTensor:
        """The bytes of `weight()`."""
        ...


class Leaning(OnGrid, Protocol):
    """A weight that has places."""

    def lean(self, curvature: Tensor, gradient: Tensor | None = None) -> None:
        """Draws places back to their integers, by adding to the gradients.

        By `curvature` c, the second derivatives of a loss by the weights, a place is drawn by c s^2
        times how far it is from its integer: so half-way to the next its gradient is what the loss
        would change by the crossing. `gradient` is that of more loss, at the weights.
        """
        ...


def trainable(scheme: Scheme) -> bool:
    """Whether a scheme has integers that can be trained."""
    return scheme.name in GRIDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """What stays of the grid of a tensor: all but its steps, of which a row has `groups`.

    `low` and `high` are the ends of the integers [rows, groups], or [1, 1] where all are equal;
    `unit` [rows, groups] is what a step is a whole multiple of, where the scheme has that.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    groups: int
    low: Tensor
    high: Tensor
    unit: Tensor | None

    def steps(self, wished: Tensor) -> Tensor:
        """Steps [rows, groups] as they are stored."""
        return grid_of(self.scheme).storable(wished, self._scales(wished))

    def rounded(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The integers of places [rows, groups, group], and what they were beyond the ends."""
        wished = place.round()
        low, high = (end[..., None].to(place.dtype) for end in (self.low, self.high))
        integers = torch.maximum(wished, low)
        return torch.minimum(integers, high, out=integers), wished

    def grouped(self, x: Tensor) -> Tensor:
        """[rows, groups, group]."""
        return x.reshape(-1, self.groups, self.shape[-1] // self.groups)

    def packed(self, integers: Tensor, step: Tensor) -> QTensor:
        """The bytes of integers under steps that need not be stored ones."""
        scales = self._scales(self.steps(step.detach()))
        rows = integers.view(-1, self.shape[-1])
        return QTensor(self.scheme, self.shape, store(rows, scales, self.scheme).data)

    def _scales(self, step: Tensor) -> Scales:
        low, high = (end.expand_as(step) for end in (self.low, self.high))
        return Scales(step=step, low=low, high=high, unit=self.unit)


def _opened(q: QTensor, device: str) -> tuple[Tensor, Tensor, Lattice]:
    """Integers int8 [rows, groups, group], steps [rows, groups], and their lattice."""
    integers, scales = integers_of(q, device=device)
    lattice = Lattice(
        scheme=q.scheme,
        shape=q.shape,
        groups=scales.step.shape[1],
        low=_once(scales.low),
        high=_once(scales.high),
        unit=scales.unit,
    )
    return lattice.grouped(integers), scales.step, lattice


def _once(ends: Tensor) -> Tensor:
    """[1, 1] if all are equal."""
    first = ends[:1, :1].clone()
    return first if bool((ends == first).all()) else ends


def _size(step: Tensor) -> float:
    return max(float(step.detach().abs().mean()), torch.finfo(torch.float16).tiny)


def _places(original: Tensor, integers: Tensor, step: Tensor, lattice: Lattice) -> Tensor:
    """Where the weights of `original` lie, as near as they round to `integers`."""
    wished = lattice.grouped(original.to(step.device, torch.float32).reshape(-1))
    wished = wished * inverse(step)[..., None]
    return wished.sub_(integers).clamp_(-EDGE, EDGE).add_(integers)


class Places:
    """Every weight and step of a tensor is trained; places are kept in f32, or in bf16."""

    def __init__(
        self, q: QTensor, original: Tensor, device: str, *, kept: torch.dtype = torch.float32
    ) -> None:
        integers, step, self._lattice = _opened(q, device)
        place = _places(original, integers, step, self._lattice).to(kept)
        self._place = place.requires_grad_()
        self._step = step.requires_grad_()
        self._unit = _size(step)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {PLACE: self._place, STEP: self._step}

    @property
    def rates(self) -> Mapping[str, float]:
        return {PLACE: 1.0, STEP: self._unit}

    def weight(self) -> Tensor:
        weight: Tensor = _Placed.apply(self._place, self._step, self._lattice)  # type: ignore
        return weight.view(self._lattice.shape)

    def lean(self, curvature: Tensor, gradient: Tensor | None = None) -> None:
        place = self._place.detach().float()
        at_place = _leant(place, self._step, curvature, gradient, self._lattice)
        _add(self._place, at_place.to(self._place.dtype))

    def stored(self) -> QTensor:
        integers, _ = self._lattice.rounded(self._place.detach().float())
        return self._lattice.packed(integers, self._step)


class Steps:
    """The steps of a tensor are trained; its integers stay packed as they are stored."""

    def __init__(self, q: QTensor, device: str) -> None:
        _, step, self.lattice = _opened(q, device)
        self._bytes = torch.tensor(q.blocks, device=device)
        self._step = step.requires_grad_()
        self._unit = _size(step)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {STEP: self._step}

    @property
    def rates(self) -> Mapping[str, float]:
        return {STEP: self._unit}

    def integers(self) -> Tensor:
        """int8 [rows, groups, group]."""
        return self.lattice.grouped(grid_of(self.lattice.scheme).read(self._bytes)[0])

    def weight(self) -> Tensor:
        weight: Tensor = _Stepped.apply(self._step, self)  # type: ignore
        return weight.view(self.lattice.shape)

    def stored(self) -> QTensor:
        return self.lattice.packed(self.integers().float(), self._step)


class Updates:
    """A change of low rank inside the rounding, and the steps, are trained.

    `seed` draws what the update starts from: `down` at random, `up` zero, so it changes nothing.
    """

    def __init__(self, q: QTensor, original: Tensor, device: str, *, rank: int, seed: int) -> None:
        integers, step, self.lattice = _opened(q, device)
        self._bytes = torch.tensor(q.blocks, device=device)
        place = _places(original, integers, step, self.lattice)
        rest = ((place - integers + 0.5) * SIXTEENTHS).clamp_(0, SIXTEENTHS - 1)
        self._rest = write_nibbles(rest.view(integers.shape[0], -1).to(torch.uint8))
        rows, width = integers.shape[0], q.width
        chance = torch.Generator().manual_seed(seed)
        down = torch.randn(rank, width, generator=chance).mul_(width**-0.5)
        self._down = down.to(device).requires_grad_()
        self._up = torch.zeros(rows, rank, device=device).requires_grad_()
        self._step = step.requires_grad_()
        self._unit = _size(step)

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return {UP: self._up, DOWN: self._down, STEP: self._step}

    @property
    def rates(self) -> Mapping[str, float]:
        return {UP: 1.0, DOWN: 1.0, STEP: self._unit}

    def places(self, up: Tensor, down: Tensor) -> Tensor:
        """[rows, groups, group] of an update."""
        integers = grid_of(self.lattice.scheme).read(self._bytes)[0]
        rest = read_nibbles(self._rest).float().add_(0.5).div_(SIXTEENTHS).sub_(0.5)
        start = rest.add_(integers.reshape(rest.shape))
        return self.lattice.grouped(start.addmm_(up, down))

    def weight(self) -> Tensor:
        weight: Tensor = _Updated.apply(self._up, self._down, self._step, self)  # type: ignore
        return weight.view(self.lattice.shape)

    @torch.no_grad()
    def lean(self, curvature: Tensor, gradient: Tensor | None = None) -> None:
        place = self.places(self._up, self._down)
        at_place = _leant(place, self._step, curvature, gradient, self.lattice)
        at_product = at_place.view(len(self._up), -1)
        _add(self._up, at_product @ self._down.t())
        _add(self._down, self._up.t() @ at_product)

    def stored(self) -> QTensor:
        with torch.no_grad():
            integers, _ = self.lattice.rounded(self.places(self._up, self._down))
        return self.lattice.packed(integers, self._step)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, place: Tensor, step: Tensor, lattice: Lattice) -> Tensor:
        ctx.save_for_backward(place, step)
        ctx.lattice = lattice
        return lattice.rounded(place)[0].float().mul_(lattice.steps(step)[..., None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        place, step = ctx.saved_tensors
        at_place, at_step = _back(gradients[0], place, step, ctx.lattice)
        return at_place.to(place.dtype), at_step, None


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, steps: Steps) -> Tensor:
        ctx.steps = steps
        return steps.integers() * steps.lattice.steps(step)[..., None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        integers = ctx.steps.integers()
        return (gradients[0] * integers).sum(-1), None


class _Updated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up: Tensor, down: Tensor, step: Tensor, updates: Updates) -> Tensor:
        ctx.save_for_backward(up, down, step)
        ctx.updates = updates
        lattice = updates.lattice
        return lattice.rounded(updates.places(up, down))[0].mul_(lattice.steps(step)[..., None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        up, down, step = ctx.saved_tensors
        lattice = ctx.updates.lattice
        place = ctx.updates.places(up, down)
        at_place, at_step = _back(gradients[0], place, step, lattice)
        at_product = at_place.view(len(up), -1)
        return at_product @ down.t(), up.t() @ at_product, at_step, None


def _add(leaf: Tensor, gradient: Tensor) -> None:
    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


def _leant(
    place: Tensor, step: Tensor, curvature: Tensor, gradient: Tensor | None, lattice: Lattice
) -> Tensor:
    """The gradients of `Leaning.lean` at places [rows, groups, group]; at `step` they are added."""
    integers, _ = lattice.rounded(place)
    squares = lattice.steps(step.detach()).square()[..., None]
    at_place = (place - integers).mul_(lattice.grouped(curvature)).mul_(squares)
    if gradient is not None:
        straight, at_step = _back(lattice.grouped(gradient), place, step.detach(), lattice)
        _add(step, at_step)
        at_place.add_(straight)
    return at_place


def _back(gradient: Tensor, place: Tensor, step: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """The gradients at places and steps from that at the weights [rows, groups, group]."""
    integers, wished = lattice.rounded(place.float())
    inside = integers == wished
    at_step = integers.mul_(gradient).sum(-1)
    at_place = wished.copy_(inside).mul_(gradient).mul_(lattice.steps(step)[..., None])
    return at_place, at_step
