"""Calibrated quantization, a layer at a time.

The calibration windows flow through the model as it becomes: every layer sees the states that the
quantized layers before it give, and within a layer each group of weights sees what the quantized
groups before it give. For every group the Hessian of its inputs is gathered, the method chooses the
integers (`methods.py`), and the layer goes on with the weights that will ship. A finished part is
written to a folder beside the output (`stages.py`); after a kill the windows run through the
finished parts again, which costs a fraction of what was done there, and the work goes on.

What takes tokens in comes first (`tables.py`).

Memory on the device: one layer in f32, its Hessians, the activations of a batch; for an embedding
the head. Beside it the states of all windows, in main memory or on the disk (`flow.py`).

Same inputs, same bytes: nothing depends on time, on kills, or on what else the machine does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from halfbyte.formats.progress import Progress
from halfbyte.numerics.codec import encode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer import awq
from halfbyte.quantizer.block import GROUPS, HALVES, Block, Group, Half
from halfbyte.quantizer.curvature import damped
from halfbyte.quantizer.ends import DAMPING
from halfbyte.quantizer.flow import Flow
from halfbyte.quantizer.fold import FOLDS, Fold, fold
from halfbyte.quantizer.moment import SecondMoment
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import outer
from halfbyte.quantizer.quantization import Quantization
from halfbyte.quantizer.stages import stage_of
from halfbyte.quantizer.tables import Tables
from halfbyte.specs import SCHEMES


class Blockwise:
    """One job: what is asked is made by a method that looks at inputs."""

    def __init__(self, asked: Quantization) -> None:
        self._asked = asked
        self._ops = ObservedOps(asked.device)
        self._tables = Tables(asked, self._ops)
        self._decoder = outer(asked.source, self._ops)

    def run(self, progress: Progress | None = None) -> None:
        """Makes every part that is not there yet.

        Raises what the methods do, naming the tensor; `IntegrityError` for activations that are
        not numbers; `DoesNotFitError` for a full disk. What was made before stays.
        """
        source = self._asked.source
        flow = self._asked.flow()
        done, total = 0, source.spec.parameters
        with torch.no_grad():
            for stage, tensors in groupby(source.tensors(), lambda item: stage_of(item[0])):
                made = self._part(stage, tensors, flow)
                done += sum(q.num_rows * q.width for q in made.values())
                if progress is not None:
                    progress(done, total)

    def _part(
        self, stage: str, tensors: Iterable[tuple[str, QTensor]], flow: Flow
    ) -> Mapping[str, QTensor]:
        """A part as it is stored; the windows go through it."""
        stages = self._asked.stages
        finished = stages.has(stage)
        given = dict(stages.load(stage) if finished else tensors)
        if stage == "embed":
            made = given if finished else self._tables.entry(given)
            flow.enter(outer(self._asked.source, self._ops, made))
        elif stage == "head":
            made = given if finished else self._tables.exit(given, lambda: self._head_hessian(flow))
        else:
            made = self._layer(int(stage.split(".")[1]), given, flow, finished=finished)
        if not finished:
            stages.save(stage, made)
        return made

    def _layer(
        self, index: int, tensors: Mapping[str, QTensor], flow: Flow, *, finished: bool
    ) -> dict[str, QTensor]:
        block = Block(self._decoder, self._ops, index)
        for name, q in tensors.items():
            block.put(name, self._asked.given(name, q))
        for half in HALVES:
            if not finished:
                self._solve_half(block, half, flow)
            block.advance(half, flow)
        return {name: block.tensors[name].stored for name in tensors}

    def _solve_half(self, block: Block, half: Half, flow: Flow) -> None:
        for at in FOLDS if self._asked.method == "awq" else ():
            if at.group.half == half and block.members(at.group):
                self._scale_channels(block, at, flow)
        for group in GROUPS:
            if group.half == half and block.members(group):
                self._solve(block, group, flow)

    def _scale_channels(self, block: Block, at: Fold, flow: Flow) -> None:
        """The channels that a group reads take the factors that are best for its rounding."""
        readers = block.members(at.group)
        changed = [*readers, f"{block.name}.{at.producer}.weight"]
        if self._asked.settled(readers[0]) or not all(
            self._asked.source.schemes[n].is_float for n in changed
        ):
            return
        hessian = block.hessians(at.group, flow, final=False)[0]
        weights = [block.dense[n] for n in readers]
        factors = awq.channel_scales(weights, hessian, self._asked.schemes[readers[0]])
        for name, tensor in fold(block.dense, block.name, at, factors).items():
            block.put(name, self._asked.given(name, encode(tensor, SCHEMES["f32"])))

    def _solve(self, block: Block, group: Group, flow: Flow) -> None:
        """A group's weights take the schemes they are stored in."""
        unsolved = [name for name in block.members(group) if not self._asked.settled(name)]
        if not unsolved:
            return
        hessians = block.hessians(group, flow)
        for name in unsolved:
            block.put(name, self._asked.solved(name, block.dense[name], hessians))

    def _head_hessian(self, flow: Flow) -> Tensor:
        """Of what the last layer gives, as it is now."""
        states = (self._decoder.leave(batch.x.to(self._ops.device)) for batch in flow.batches)
        moment = SecondMoment.of(states, self._asked.source.spec.hidden, self._ops.device)
        return damped(moment.mean, DAMPING)
