"""Calibrated quantization, a layer at a time.

The calibration windows flow through the model as it becomes: every layer sees the states that the
quantized layers before it give, and within a layer each group of weights sees what the quantized
groups before it give. For every group the Hessian of its inputs is gathered, the method chooses the
integers (`methods.py`), and the layer goes on with the weights that will ship. A finished part is
written to a folder beside the output (`stages.py`); after a kill the windows run through the
finished parts again, which costs a fraction of what was done there, and the work goes on.

An embedding comes first, and what it does is known last: how the model's predictions hang on it is
found by a walk through the original and back (`gradients.py`), over some of the windows; one that
is stored in 8 bits is searched.

Memory on the device: one layer in f32, its Hessians, the activations of a batch; on the walk, the
head. Beside it the states of all windows, in main memory or on the disk (`flow.py`).

Same inputs, same bytes: nothing depends on time, on kills, or on what else the machine does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.progress import Progress
from halfbyte.kernels.reference.ops import Weight
from halfbyte.numerics.codec import convert, decode, encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer import awq
from halfbyte.quantizer.block import GROUPS, HALVES, Block, Group, Half
from halfbyte.quantizer.calibrate import Calibration
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING, Ends
from halfbyte.quantizer.flow import IN_MEMORY, Flow
from halfbyte.quantizer.fold import FOLDS, Fold, fold
from halfbyte.quantizer.gradients import Walk
from halfbyte.quantizer.methods import solve
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import EMBED, HEAD, PROJECT, outer
from halfbyte.quantizer.stages import Stages, stage_of
from halfbyte.specs import SCHEMES, Scheme, SolveMethod

WALKED = 4096  # tokens that walk back, too
PLAIN = frozenset({"f32", "f16", "bf16"})
# A table's rounding to these is lost in that of the layers: not worth a walk through the model.
FINE = frozenset({"q8_0"})
ROWS = 1 << 25  # weights of a table that are solved at once: 128 MiB in f32


class Blockwise:
    """One job: a source's tensors, stored in `schemes` by a calibrated method, into `stages`."""

    def __init__(
        self,
        source: Source,
        schemes: Mapping[str, Scheme],
        calibration: Calibration,
        stages: Stages,
        *,
        method: SolveMethod,
        device: str = "cpu",
        in_memory: int = IN_MEMORY,
    ) -> None:
        self._source, self._schemes, self._stages = source, schemes, stages
        self._calibration = calibration
        self._method: SolveMethod = method
        self._ops = ObservedOps(device)
        self._decoder = outer(source, self._ops)
        self._in_memory = in_memory

    def run(self, progress: Progress | None = None) -> None:
        """Makes every part that is not there yet.

        Raises what the methods do, naming the tensor; `IntegrityError` for activations that are
        not numbers; `DoesNotFitError` for a full disk. What was made before stays.
        """
        if all(map(self._stages.has, self._stages.names)):
            return
        flow = self._flow()
        done, total = 0, self._source.spec.parameters
        with torch.no_grad():
            for stage, tensors in groupby(self._source.tensors(), lambda item: stage_of(item[0])):
                made = self._part(stage, tensors, flow)
                done += sum(q.num_rows * q.width for q in made.values())
                if progress is not None:
                    progress(done, total)

    def _part(
        self, stage: str, tensors: Iterable[tuple[str, QTensor]], flow: Flow
    ) -> Mapping[str, QTensor]:
        """A part as it is stored; the windows go through it."""
        finished = self._stages.has(stage)
        given = dict(self._stages.load(stage) if finished else tensors)
        if stage == "embed":
            made = given if finished else self._entry(given)
            flow.enter(outer(self._source, self._ops, made))
        elif stage == "head":
            made = given if finished else self._exit(given, flow)
        else:
            made = self._layer(int(stage.split(".")[1]), given, flow, finished=finished)
        if not finished:
            self._stages.save(stage, made)
        return made

    def _layer(
        self, index: int, tensors: Mapping[str, QTensor], flow: Flow, *, finished: bool
    ) -> dict[str, QTensor]:
        block = Block(self._decoder, self._ops, index)
        for name, q in tensors.items():
            self._put(block, name, q)
        for half in HALVES:
            if not finished:
                self._solve_half(block, half, flow)
            block.advance(half, flow)
        return {name: block.tensors[name].stored for name in tensors}

    def _solve_half(self, block: Block, half: Half, flow: Flow) -> None:
        for at in FOLDS if self._method == "awq" else ():
            if at.group.half == half and block.members(at.group):
                self._scale_channels(block, at, flow)
        for group in GROUPS:
            if group.half == half and block.members(group):
                self._solve(block, group, flow)

    def _scale_channels(self, block: Block, at: Fold, flow: Flow) -> None:
        """The channels that a group reads take the factors that are best for its rounding."""
        readers = block.members(at.group)
        changed = [*readers, f"{block.name}.{at.producer}.weight"]
        if self._settled(readers[0]) or not all(self._source.schemes[n].is_float for n in changed):
            return
        hessian = block.hessians(at.group, flow, final=False)[0]
        weights = [block.dense[n] for n in readers]
        factors = awq.channel_scales(weights, hessian, self._schemes[readers[0]])
        for name, tensor in fold(block.dense, block.name, at, factors).items():
            self._put(block, name, encode(tensor, SCHEMES["f32"]))

    def _put(self, block: Block, name: str, q: QTensor) -> None:
        """A tensor to solve, or as it will be stored where there is nothing to solve."""
        block.put(name, convert(q, self._schemes[name]) if self._settled(name) else q)

    def _solve(self, block: Block, group: Group, flow: Flow) -> None:
        """A group's weights take the schemes they are stored in."""
        unsolved = [name for name in block.members(group) if not self._settled(name)]
        if not unsolved:
            return
        hessians = block.hessians(group, flow)
        for name in unsolved:
            weight = block.dense[name]
            matrices = weight if group.routed else weight[None]
            solved = [
                solve(name, matrix, hessian, self._schemes[name], self._method)
                for matrix, hessian in zip(matrices, hessians, strict=True)
            ]
            block.put(name, _stacked(solved, tuple(weight.shape)))

    def _entry(self, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """What takes tokens in."""
        made = self._converted(tensors)
        if EMBED not in made:
            made[EMBED] = self._table(EMBED, tensors[EMBED], self._embedding_hessian())
        if PROJECT in tensors and PROJECT not in made:
            table, scale = Weight(made[EMBED]), self._source.spec.embed_scale
            states = (self._ops.embed(batch.rows, table, scale) for batch in self._flow().batches)
            made[PROJECT] = self._table(PROJECT, tensors[PROJECT], self._moment(states))
        return made

    def _exit(self, tensors: Mapping[str, QTensor], flow: Flow) -> dict[str, QTensor]:
        """The final norm, and a head of its own."""
        made = self._converted(tensors)
        if HEAD in tensors and HEAD not in made:
            states = (self._decoder.leave(batch.x.to(self._ops.device)) for batch in flow.batches)
            hessian = damped(self._moment(states), DAMPING)
            made[HEAD] = self._table(HEAD, tensors[HEAD], hessian)
        return made

    def _converted(self, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """The tensors whose inputs say nothing of how to store them."""
        return {
            name: convert(q, self._schemes[name], method="search")
            for name, q in tensors.items()
            if name not in (EMBED, PROJECT, HEAD) or self._settled(name) or self._fine(name)
        }

    def _settled(self, name: str) -> bool:
        """Whether there is nothing to choose: it is on a grid already, or will be on none."""
        return not self._source.schemes[name].is_float or self._schemes[name].name in PLAIN

    def _fine(self, name: str) -> bool:
        return self._schemes[name].name in FINE

    def _embedding_hessian(self) -> Tensor:
        """What an error of the embedding costs: known from a walk through the original."""
        ends = Ends(self._source.spec, self._ops.device)
        seed = self._calibration.sampling.seed
        count = max(1, WALKED // max(map(len, self._calibration.windows)))
        Walk(self._source, self._ops, self._flow(count), seed=seed).run(ends)
        return ends.hessian

    def _table(self, name: str, q: QTensor, hessian: Tensor) -> QTensor:
        """A table of many rows, some of them at once."""
        scheme, device = self._schemes[name], self._ops.device
        step = max(1, ROWS // q.width)
        starts = range(0, q.num_rows, step)
        pieces = (q.rows(start, min(start + step, q.num_rows)) for start in starts)
        solved = [
            solve(name, decode(piece, device=device), hessian, scheme, self._method)
            for piece in pieces
        ]
        return _stacked(solved, q.shape)

    def _moment(self, states: Iterable[Tensor]) -> Tensor:
        return SecondMoment.of(states, self._source.spec.hidden, self._ops.device).mean

    def _flow(self, count: int | None = None) -> Flow:
        """The first `count` windows, or all."""
        windows = self._calibration.windows[:count]
        return Flow(self._source.spec, windows, self._stages.folder, in_memory=self._in_memory)


def _stacked(parts: Sequence[QTensor], shape: tuple[int, ...]) -> QTensor:
    """Stored rows on top of each other, as one tensor of this shape."""
    if len(parts) == 1:
        return QTensor(parts[0].scheme, shape, parts[0].data)
    return QTensor(parts[0].scheme, shape, np.concatenate([part.data for part in parts]))
