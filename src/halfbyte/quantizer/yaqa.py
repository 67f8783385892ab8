"""YAQA on the grid of a scheme: rounding for what the whole model predicts, not for one layer.

What an error e [N, K] of a weight does to the model's predictions is, to second order, a quadratic
form of N K by N K. Its Kronecker approximation is tr(G e A e^T), with A [K, K] of the inputs and G
[N, N] of the gradients at the outputs (`two_sided.py` gathers both). GPTQ is the case G = I, where
rows know nothing of each other. Here a row makes up for the errors of other rows, too: with
G = (B + I) D (B + I)^T, B strictly upper, row i is rounded as GPTQ does around
w_i + sum_p<i B_pi e_p. The most important rows go first, `ROWS` at once, as if these few knew
nothing of each other. Sweeps of `descent` follow, each row around what all others leave of it; a
few rows whose sweep made the whole worse keep what they had.

Time: about N K (N + K) multiplications for the start and for each sweep. Source: Tseng et al.
2025, "Model-preserving adaptive rounding" (arXiv 2505.22988); the sweeps, which refit the scales,
are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.numerics.codec import choose_scales, store
from halfbyte.numerics.grids import grid_of
from halfbyte.numerics.qtensor import QTensor
from halfbyte.numerics.scales import Scales, joined, meant, nearest_on
from halfbyte.quantizer.columns import round_all, transposed
from halfbyte.quantizer.curvature import check, factored
from halfbyte.quantizer.descent import Descent
from halfbyte.specs import Scheme

ROWS = 16  # that are rounded at once
SWEEPS = 3
# G is known less well than A: a token tells all of its input, and one gradient of many.
INPUT_DAMPING, OUTPUT_DAMPING = 0.01, 0.1


def solve(weight: Tensor, inputs: Tensor, outputs: Tensor, scheme: Scheme) -> QTensor:
    """`weight` [N, K] stored in `scheme`, for A = `inputs` [K, K] and G = `outputs` [N, N].

    Either may have any scale. Raises as `gptq.solve` does.
    """
    check(weight, inputs)
    check(weight.t(), outputs)
    order = outputs.diagonal().argsort(descending=True, stable=True)
    rounding = _Rounding(weight.detach().float()[order], inputs, outputs, order, scheme)
    rounding.start()
    for _ in range(SWEEPS):
        rounding.sweep()
    integers, scales = rounding.best()
    back = order.argsort()
    return store(integers[back], scales.each(lambda field: field[back]), scheme)


@dataclass(frozen=True, slots=True, eq=False)
class _Few:
    """A few rows as they are stored now: integers [K, n], scales [groups, n]."""

    integers: Tensor
    scales: Scales

    def copied(self) -> _Few:
        return _Few(self.integers.clone(), self.scales.each(Tensor.clone))

    @property
    def rows(self) -> tuple[Tensor, Scales]:
        return transposed(self.integers), self.scales.each(transposed)


class _Rounding:
    """A weight [N, K] on its way to the grid, its rows in `order`, that of their importance.

    `outputs` is as it was before that order.
    """

    def __init__(
        self, weight: Tensor, inputs: Tensor, outputs: Tensor, order: Tensor, scheme: Scheme
    ) -> None:
        self._weight, self._storable = weight, grid_of(scheme).storable
        self._columns = inputs.diagonal().argsort(descending=True, stable=True)
        self._inputs, self._across = factored(inputs, self._columns, INPUT_DAMPING)
        regular, self._down = factored(outputs, order, OUTPUT_DAMPING)
        self._outputs = regular[order[:, None], order]
        self._plain = choose_scales(weight, scheme, self._inputs.diagonal())
        self._errors = torch.zeros_like(weight)
        self._found: dict[int, _Few] = {}  # by the first of the rows

    def start(self) -> None:
        """All rows, each around the errors of those before it."""
        for rows in self._places():
            carried = self._down[: rows.start, rows].t() @ self._errors[: rows.start]
            base = transposed(self._weight[rows] + carried)
            scales = self._plain.each(lambda field, rows=rows: transposed(field[rows]))
            integers = round_all(base, scales, self._across, self._columns)
            self._keep(rows, _Few(integers, scales))

    def sweep(self) -> None:
        """All rows, each around the errors of all others."""
        for rows in self._places():
            errors, outputs = self._errors[rows], self._outputs[rows]
            pull = outputs @ self._errors
            base = self._weight[rows] - errors + pull / outputs[:, rows].diagonal()[:, None]
            few = self._found[rows.start].copied()
            Descent(
                transposed(base), self._inputs, few.integers, few.scales, self._storable
            ).sweep()
            change = self._weight[rows] - meant(*few.rows) - errors
            cost = (2 * pull + outputs[:, rows] @ change) @ self._inputs
            if float((change * cost).sum()) < 0:
                self._keep(rows, few)

    def best(self) -> tuple[Tensor, Scales]:
        """Integers [N, K] and scales [N, groups]: what was found, or a better plain search."""
        plain = nearest_on(self._weight, self._plain)
        if self._cost(self._weight - meant(plain, self._plain)) < self._cost(self._errors):
            return plain, self._plain
        integers, scales = zip(*(few.rows for few in self._found.values()), strict=True)
        return torch.cat(integers), joined(scales)

    def _cost(self, errors: Tensor) -> float:
        """tr(G e A e^T)."""
        return float((self._outputs @ errors @ self._inputs * errors).sum())

    def _keep(self, rows: slice, few: _Few) -> None:
        self._found[rows.start] = few
        self._errors[rows] = self._weight[rows] - meant(*few.rows)

    def _places(self) -> Iterator[slice]:
        for start in range(0, len(self._weight), ROWS):
            yield slice(start, min(start + ROWS, len(self._weight)))
