"""What every way to store every group of tensors costs: the divergence it would bring, in nats.

The cost of a rounding error is told by Fisher's gradients (`gradients.py`): half the mean over the
tokens of (gradient . change)^2 at the outputs of a group, the change being what a search for the
scales of that scheme leaves. Nothing is replaced to find out, so one walk prices all groups and
schemes at once; costs of several groups add up.

What it is not: a measurement. Errors are assumed small and independent of one another, and a
calibrated method leaves less than the search that is priced here; both are much the same for all,
and order and ratios are what an allocation needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.contract import Rows
from halfbyte.numerics.codec import decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.block import GROUPS, Block
from halfbyte.quantizer.ends import Ends
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.observed import ObservedOps, Passed
from halfbyte.quantizer.outer import EMBED, HEAD
from halfbyte.specs import Recipe, Scheme

CANDIDATES = ("q4_0", "q6_k", "q8_0", "bf16")
ROWS = 1 << 24  # weights of a table that are looked at together

Costs = Mapping[tuple[str, str], float]
"""(name of a group, candidate) -> nats per token."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Tensors that are stored in one scheme; for a candidate, `schemes_for` says in which."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]

    def schemes_for(self, candidate: str) -> dict[str, Scheme]:
        """By tensor, fallbacks for its width included."""
        recipe = Recipe(name=candidate, rules=(("*", candidate),))
        return {name: recipe.scheme_for(name, shape) for name, shape in self.shapes.items()}

    def bytes(self, candidate: str) -> int:
        schemes = self.schemes_for(candidate)
        return sum(schemes[name].bytes(shape) for name, shape in self.shapes.items())


def shared_of(source: Source) -> list[Shared]:
    """What there is to choose a scheme for, in the order of the forward pass.

    The weights of a layer that have one input go together; what is quantized already is no choice.
    """
    shapes = {
        tensor.name: tensor.shape
        for tensor in source.spec.tensors()
        if source.schemes[tensor.name].is_float
    }
    named: dict[str, list[str]] = {EMBED: [EMBED]}
    for index in range(len(source.spec.layers)):
        for group in GROUPS:
            parts = "+".join(part.rpartition(".")[2] for part in group.parts)
            members = [f"layers.{index}.{part}.weight" for part in group.parts]
            named[f"layers.{index}.{group.parts[0].partition('.')[0]}.{parts}"] = members
    named[HEAD] = [HEAD]
    found = [Shared(name, {n: shapes[n] for n in of if n in shapes}) for name, of in named.items()]
    return [group for group in found if group.shapes]


def priced(
    source: Source, windows: Sequence[Sequence[int]], folder: Path, *, device: str, seed: int = 0
) -> Costs:
    """The costs of all groups and candidates over windows of token ids; `folder` takes the states
    that memory should not."""
    visitor = Sensitivity(source, device)
    Walk(source, ObservedOps(device), Flow(source.spec, windows, folder), seed=seed).run(visitor)
    return visitor.costs()


class Sensitivity:
    """The visitor of a walk through a source that prices all groups and candidates."""

    def __init__(self, source: Source, device: str) -> None:
        self._source, self._device = source, device
        self._ends = Ends(source.spec, device)
        self._group_of = {name: group for group in shared_of(source) for name in group.shapes}
        self._stored: dict[tuple[str, str], QTensor] = {}  # of the layer that is walked through
        self._squares: dict[tuple[str, str], float] = defaultdict(float)
        self._tokens = 0

    def costs(self) -> Costs:
        found = {key: square / (2 * self._tokens) for key, square in self._squares.items()}
        for name in (EMBED, HEAD):
            if name in self._group_of:
                found |= {
                    (name, candidate): self._table(name, candidate) for candidate in CANDIDATES
                }
        return found

    def top(self, states: Tensor, probabilities: Tensor, gradient: Tensor) -> None:
        self._ends.top(states, probabilities, gradient)

    def behind(self, block: Block, gradient: Tensor) -> None:
        pass

    def layer(self, block: Block, passed: Sequence[Passed], gradients: Sequence[Tensor]) -> None:
        names = {id(weight): name for name, weight in block.tensors.items()}
        for candidate in CANDIDATES:
            changes: dict[tuple[str, int | None], Tensor] = {}
            for product, gradient in zip(passed, gradients, strict=True):
                name = names[id(product.weight)]
                if name in self._group_of:
                    change = self._change(name, candidate, product, gradient)
                    key = self._group_of[name].name, product.expert
                    changes[key] = changes[key] + change if key in changes else change
            for (group, _), change in changes.items():
                self._squares[group, candidate] += float(change.square().sum())

    def left(self, block: Block) -> None:
        self._stored.clear()

    def entered(self, rows: Rows, gradient: Tensor) -> None:
        self._ends.entered(rows, gradient)
        self._tokens += len(gradient)

    def _change(self, name: str, candidate: str, product: Passed, gradient: Tensor) -> Tensor:
        """How far the rounding error of a weight moves log p of what was drawn [R]."""
        weight = product.weight.dense
        assert weight is not None
        if (name, candidate) not in self._stored:
            scheme = self._group_of[name].schemes_for(candidate)[name]
            self._stored[name, candidate] = encode(weight, scheme, method="search")
        error = decode(self._stored[name, candidate], device=self._device) - weight
        if product.expert is not None:
            error = error[product.expert]
        return ((product.input @ error.T) * gradient).sum(-1)

    def _table(self, name: str, candidate: str) -> float:
        """The cost of a table's rows, as `ends.py` has it."""
        ends, tied = self._ends, self._source.spec.tied_head
        scheme = self._group_of[name].schemes_for(candidate)[name]
        q = self._source.tensor(name)
        step, total = max(1, ROWS // q.width), 0.0
        for start in range(0, q.num_rows, step):
            rows = slice(start, min(start + step, q.num_rows))
            weight = decode(q.rows(rows.start, rows.stop), device=self._device)
            error = decode(encode(weight, scheme, method="search"), device=self._device) - weight
            if name == EMBED:
                total += float(ends.read[rows] @ _quadratic(error, ends.entry))
            if name == HEAD or tied:
                total += float(ends.predicted[rows] @ _quadratic(error, ends.final))
        return total / 2


def _quadratic(rows: Tensor, hessian: Tensor) -> Tensor:
    """e^T H e of every row [R]."""
    return ((rows @ hessian) * rows).sum(-1)
