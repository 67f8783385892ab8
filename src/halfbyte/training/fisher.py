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

What it is not: for tables, whose rows are too many; for a task, which goes away on purpose.
Source: the form is that of Tseng et al. 2025 (arXiv 2505.22988); that places oscillate, and a pull
towards integers helps, Nagel et al. 2022, "Overcoming oscillations in quantization-aware training"
(arXiv 2203.11086). The strength of the pull is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.sides import BothSides
from halfbyte.quantizer.stages import stage_of
from halfbyte.specs import ModelSpec
from halfbyte.training.checkpoints import restore, save
from halfbyte.training.grid import Places
from halfbyte.training.student import Tensors

FORM = 4.0  # how much a form counts beside the loss on the windows
OWN = 0.5  # of the curvature of that loss, bounded as it is (`divergence.py`), by the form


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Form:
    """The form of a matrix [N, K], or of a stack of E: `inputs` [E, K, K], `outputs` [E, N, N]."""

    inputs: Tensor
    outputs: Tensor

    def gradient(self, errors: Tensor) -> Tensor:
        """G e A, of errors in their tensor's shape."""
        return (self.outputs @ errors @ self.inputs).view(errors.shape)

    @property
    def diagonal(self) -> Tensor:
        """The second derivative by every weight: [E, N, K]."""
        inputs, outputs = (it.diagonal(dim1=-2, dim2=-1) for it in (self.inputs, self.outputs))
        return outputs[..., :, None] * inputs[..., None, :]

    def cost(self, errors: Tensor) -> float:
        """Nats per token."""
        return float((self.gradient(errors) * errors).sum()) / 2

    def rest(self, weight: Tensor, original: Tensor) -> Tensor:
        """What every weight would be if all others stayed as they are, and there were no grid."""
        pull = self.gradient(weight - original)
        return weight - pull * inverse(self.diagonal).view(pull.shape)


class Gathered:
    """The forms of a job on the disk, a file for each layer."""

    def __init__(self, spec: ModelSpec, names: Collection[str], folder: Path, device: str) -> None:
        self._folder, self._device = folder, device
        self._shapes: dict[str, dict[str, Sequence[int]]] = {}
        for tensor in spec.tensors():
            if tensor.name in names:
                layer = self._shapes.setdefault(stage_of(tensor.name), {})
                layer[tensor.name] = (1, *tensor.shape)[-3:]

    @property
    def layers(self) -> list[str]:
        return [*self._shapes]

    def names(self, layer: str) -> Collection[str]:
        return self._shapes.get(layer, {})

    def has(self, layer: str) -> bool:
        return self._place(layer).is_file()

    def save(self, layer: str, found: Mapping[str, Form]) -> None:
        """Raises `DoesNotFitError` where the disk is full."""
        save(self._place(layer), _sides(found), {})

    def load(self) -> dict[str, Form]:
        """All of them, on the device."""
        found: dict[str, Form] = {}
        for layer, shapes in self._shapes.items():
            own = {name: self._empty(shape) for name, shape in shapes.items()}
            restore(self._place(layer), _sides(own))
            found |= own
        return found

    def _empty(self, shape: Sequence[int]) -> Form:
        stack, rows, width = shape
        return Form(
            inputs=torch.empty(stack, width, width, device=self._device),
            outputs=torch.empty(stack, rows, rows, device=self._device),
        )

    def _place(self, layer: str) -> Path:
        return self._folder / f"{layer}.npz"


def gathered(
    source: Source,
    names: Collection[str],
    windows: Sequence[Sequence[int]],
    folder: Path,
    *,
    job: Job,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Gathered:
    """The forms of the matrices `names`, all in layers of `source`.

    They are kept in `folder`, layer by layer, which a stopped run of the same `job` takes up;
    states of the windows that memory should not take lie there, too. Raises as `Walk.run` does.
    """
    claim(folder, job)
    found = Gathered(source.spec, names, folder, device)
    if not all(map(found.has, found.layers)):
        flow = Flow(source.spec, windows, folder, every_layer=True)
        Walk(source, ObservedOps(device), flow, seed=0).run(_Gathering(found, device, progress))
    return found


class Hold:
    """What holds a training near the original: the forms of its matrices that are `Places`."""

    def __init__(
        self,
        forms: Mapping[str, Form],
        tensors: Tensors,
        original: Callable[[str], QTensor],
    ) -> None:
        self._held: list[tuple[Places, Form, QTensor]] = []
        for name, form in forms.items():
            places = tensors.trained[name]
            assert isinstance(places, Places)
            self._held.append((places, form, original(name)))

    @torch.no_grad()
    def pull(self) -> None:
        """Adds to the gradients of all places and steps."""
        for places, form, original in self._held:
            weight = places.weight()
            errors = weight - decode(original, device=str(weight.device))
            places.lean(FORM * form.gradient(errors), (FORM + OWN) * form.diagonal)


def _sides(found: Mapping[str, Form]) -> dict[str, Tensor]:
    inputs = {f"{name}.inputs": form.inputs for name, form in found.items()}
    return inputs | {f"{name}.outputs": form.outputs for name, form in found.items()}


class _Gathering:
    """The visitor that keeps the forms of every layer as it is left."""

    def __init__(self, kept: Gathered, device: str, progress: Progress | None) -> None:
        self._kept, self._progress, self._done = kept, progress, 0
        self._sides = BothSides(device)

    def top(self, states: Tensor, probabilities: Tensor) -> None:
        pass

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        if self._kept.has(block.name):
            return
        wanted = self._kept.names(block.name)
        names = {id(weight): name for name, weight in block.tensors.items()}
        for product, gradient in zip(passed, gradients, strict=True):
            name = names[id(product.weight)]
            if name in wanted:
                self._sides.add(name, product, gradient)

    def left(self, block: Block) -> None:
        names = self._kept.names(block.name)
        if names and not self._kept.has(block.name):
            self._kept.save(block.name, {name: self._form(name) for name in names})
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, len(self._kept.layers))

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        pass

    def _form(self, name: str) -> Form:
        """Both moments have the trace that the form has: one of them is divided by it."""
        inputs, outputs = self._sides.taken(name)
        assert outputs is not None
        traces = inputs.diagonal(dim1=-2, dim2=-1).sum(-1)
        return Form(inputs=inputs, outputs=outputs * inverse(traces)[:, None, None])
