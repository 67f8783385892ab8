"""What errors of the weights cost the predictions, for a training to hold on to.

To second order it is a quadratic form of the error e of a matrix, tr(G e A e^T) / 2 nats a token,
with A and G the moments of its two sides (`quantizer/sides.py`). It is gathered once, of the
original, in a walk through the windows and back; it knows no noise of batches, and nothing of what
errors of different matrices do to each other, which a loss on the windows does. The two add up.

On a grid the gradient is never zero, and an integer that is the best there is still has one: going
to the next costs g s + h s^2 / 2, with g the gradient, h the curvature and s the step, and pays
only where |g| > h s / 2. A straight-through place that followed g alone would cross whenever it had
the time, and harm. So the curvature of its own weight, the diagonal of the form, draws a place
back as it leaves its integer: half-way to the next it feels just what the crossing brings. Places
begin where they are at rest.

States have such a form, too: an error d costs d^T M d / 2, with M the mean over tokens of what each
of them hangs on (a "metric"). The divergence of one token tells only of what that token hangs on;
M asks of every token for what any hangs on, so that as many tokens tell more.

What it is not: for tables, whose rows are too many; for a task, which goes away on purpose.
Source: the form is that of Tseng et al. 2025 (arXiv 2505.22988); that places oscillate, and a pull
towards integers helps, Nagel et al. 2022, "Overcoming oscillations in quantization-aware training"
(arXiv 2203.11086). The strength of the pull is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.jobs import Job, claim
from halfbyte.formats.progress import Progress
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import inverse
from halfbyte.quantizer.block import Block
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.sides import BothSides
from halfbyte.training.checkpoints import restore, save
from halfbyte.training.grid import Leaning, Places, Updates
from halfbyte.training.student import Tensors

FORM = 4.0  # how much a form counts beside the loss on the windows
STATES = 2.0  # and how much what errors of the final states cost by their metric
OWN = 0.5 + STATES  # of the form's curvature what they have: all, and KL, bounded, a half
FINAL = "final"  # whose metric is that of the final states

Shape = tuple[int, int, int]  # matrices, rows, width


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Own:
    """The curvature of every weight of a matrix [N, K] by itself, or of a stack of E: the diagonals
    of A [E, K] and G [E, N]."""

    inputs: Tensor
    outputs: Tensor

    @property
    def curvature(self) -> Tensor:
        """The second derivatives: [E, N, K]."""
        return self.outputs[..., :, None] * self.inputs[..., None, :]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """The whole form: `inputs` A [E, K, K], `outputs` G [E, N, N]."""

    inputs: Tensor
    outputs: Tensor

    def gradient(self, errors: Tensor) -> Tensor:
        """G e A, of errors in their tensor's shape."""
        return (self.outputs @ errors @ self.inputs).view(errors.shape)

    @property
    def own(self) -> Own:
        inputs, outputs = (it.diagonal(dim1=-2, dim2=-1) for it in (self.inputs, self.outputs))
        return Own(inputs=inputs, outputs=outputs)

    def cost(self, errors: Tensor) -> float:
        """Nats per token."""
        return float((self.gradient(errors) * errors).sum()) / 2

    def shift(self, weight: Tensor, original: Tensor) -> Tensor:
        """How far every weight is from where it would be if all others stayed as they are, and
        there were no grid."""
        gradient = self.gradient(weight - original)
        return gradient.mul_(inverse(self.own.curvature).view(gradient.shape)).neg_()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What a training knows of a matrix: its curvature, the whole form where there is room for it,
    and the shift [E, N, K] from what the training begins with."""

    own: Own
    shift: Tensor
    form: Form | None = None


class Gathered(Mapping[str, Known]):
    """What was gathered of some matrices, by name: in a folder, a file for each, read when it is
    asked for. `whole`: with their forms."""

    def __init__(self, folder: Path, shapes: Mapping[str, Shape], device: str, *, whole: bool):
        self._folder, self._shapes, self._device, self._whole = folder, shapes, device, whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def has(self, name: str) -> bool:
        return self._place(name).is_file()

    def keep(self, name: str, form: Form, shift: Tensor) -> None:
        """Raises `DoesNotFitError` where the disk is full."""
        own = form.own
        parts = {"shift": shift.half(), "inputs": own.inputs, "outputs": own.outputs}
        if self._whole:
            parts |= {"inputs": form.inputs, "outputs": form.outputs}
        save(self._place(name), parts, {})

    def keep_metric(self, place: str, metric: Tensor) -> None:
        """Raises as `keep` does."""
        save(self._place(place), {"metric": metric}, {})

    def metric(self, place: str, hidden: int) -> Tensor:
        """M [H, H]: an error d of the states behind a layer, or of the `FINAL` ones, costs
        d^T M d / 2 nats a token."""
        metric = torch.empty(hidden, hidden, device=self._device)
        restore(self._place(place), {"metric": metric})
        return metric

    def __getitem__(self, name: str) -> Known:
        stack, rows, width = self._shapes[name]
        outputs, inputs = ((rows, rows), (width, width)) if self._whole else ((rows,), (width,))
        sides = {
            "outputs": torch.empty(stack, *outputs, device=self._device),
            "inputs": torch.empty(stack, *inputs, device=self._device),
        }
        shift = torch.empty(stack, rows, width, dtype=torch.float16, device=self._device)
        restore(self._place(name), {"shift": shift, **sides})
        form = Form(**sides) if self._whole else None
        return Known(own=Own(**sides) if form is None else form.own, shift=shift, form=form)

    def _place(self, name: str) -> Path:
        return self._folder / f"{name}.npz"


def gathered(
    source: Source,
    start: Mapping[str, QTensor],
    windows: Sequence[Sequence[int]],
    folder: Path,
    *,
    whole: bool,
    job: Job,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Gathered:
    """Of matrices in layers of `source`, which a training begins with as they are in `start`.

    It is kept in `folder`, which a stopped run of the same `job` takes up; states of the windows
    that memory should not take lie there, too. Raises as `Walk.run` does.
    """
    claim(folder, job)
    shapes = {name: _stacked(q.shape) for name, q in start.items()}
    found = Gathered(folder, shapes, device, whole=whole)
    if not all(map(found.has, [*found, FINAL])):
        flow = Flow(source.spec, windows, folder, every_layer=True)
        visitor = _Gathering(found, start, device, progress)
        Walk(source, ObservedOps(device), flow, seed=0).run(visitor)
    return found


class Hold:
    """What holds a training near the original, by what is known of its matrices.

    `own`: how much of their curvature the loss of the training has."""

    def __init__(
        self,
        known: Mapping[str, Known],
        tensors: Tensors,
        original: Callable[[str], QTensor],
        *,
        own: float = OWN,
    ) -> None:
        self._own = own
        self._held: list[tuple[Leaning, Own, Form | None, QTensor]] = []
        for name, weight in tensors.trained.items():
            if name in known:
                assert isinstance(weight, Places | Updates)
                it = known[name]
                self._held.append((weight, it.own, it.form, original(name)))

    @torch.no_grad()
    def pull(self) -> None:
        """Adds to the gradients of all that is held."""
        for leaning, own, form, original in self._held:
            if form is None:
                leaning.lean(self._own * own.curvature)
                continue
            weight = leaning.weight()
            errors = weight - decode(original, device=str(weight.device))
            leaning.lean((FORM + self._own) * own.curvature, FORM * form.gradient(errors))


def _stacked(shape: Sequence[int]) -> Shape:
    stack, rows, width = (1, *shape)[-3:]
    return stack, rows, width


class _Gathering:
    """The visitor that keeps what there is to know of every layer as it is left."""

    def __init__(
        self,
        found: Gathered,
        start: Mapping[str, QTensor],
        device: str,
        progress: Progress | None,
    ) -> None:
        self._found, self._start, self._progress, self._done = found, start, progress, 0
        self._device, self._sides = device, BothSides(device)
        self._metrics: dict[str, SecondMoment] = {}  # that are not kept yet

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        self._seen(FINAL, gradient)

    def behind(self, block: Block, gradient: Tensor) -> None:
        self._seen(block.name, gradient)

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            name = names[id(product.weight)]
            if name in self._found and not self._found.has(name):
                self._sides.add(name, product, gradient)

    def left(self, block: Block) -> None:
        for place, metric in self._metrics.items():
            self._found.keep_metric(place, metric.mean)
        self._metrics.clear()
        for name in self._sides.names:
            form = self._form(name)
            weight = decode(self._start[name], device=self._device)
            self._found.keep(name, form, form.shift(weight, block.dense[name]))
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, len(self._found))

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        pass

    def _seen(self, place: str, gradient: Tensor) -> None:
        if place not in self._metrics:
            self._metrics[place] = SecondMoment(gradient.shape[-1], self._device)
        self._metrics[place].add(gradient)

    def _form(self, name: str) -> Form:
        """Both moments have the trace that the form has: one of them is divided by it."""
        inputs, outputs = self._sides.taken(name)
        assert outputs is not None
        traces = inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
        return Form(inputs=inputs, outputs=outputs * inverse(traces)[:, None, None])
