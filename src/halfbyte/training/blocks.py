"""A model trained a layer at a time, on the grid that ships: each gives what the original's gives.

The windows go through the original and through what is made so far, side by side. A layer, its
weights, steps and norms, is trained to make of the one's states what the original makes of the
other's; then both go on behind it. One layer is resident, whatever the model's size. Finished ones
are kept in a folder (`quantizer/stages.py`), the one under way in a folder of its own: a kill costs
minutes, and the result is the same.

The loss is the square of the difference in a metric. Where it is known (`fisher.py`), that is
what a difference costs the predictions, in nats; else the mean square over that of what the layer
adds. 0 is the original.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.formats.atomic import write_file
from halfbyte.formats.checkpoint import Source
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import layer_weights
from halfbyte.numerics.qtensor import QTensor
from halfbyte.quantizer.flow import Batch, Flow
from halfbyte.quantizer.outer import outer
from halfbyte.quantizer.stages import Stages, stage_of
from halfbyte.training.fisher import Gathered, Hold
from halfbyte.training.loop import Learned, Outcome, Regimen, Tell, train
from halfbyte.training.modes import Trainer
from halfbyte.training.ops import TrainingOps
from halfbyte.training.order import Order
from halfbyte.training.student import Tensors


class Layer:
    """Layer `index` over `tensors`, as a step of a forward."""

    def __init__(self, decoder: Decoder, ops: TrainingOps, index: int, tensors: Tensors) -> None:
        self._decoder, self._ops, self._index = decoder, ops, index
        self.tensors = tensors

    @property
    def device(self) -> str:
        return self._ops.device

    def run(self, batch: Batch) -> Tensor:
        """The states [R, H] behind the layer, of those of a batch before it."""
        decoder, index, device = self._decoder, self._index, self._ops.device
        weights = layer_weights(
            self.tensors.weights(f"layers.{index}.", device), decoder.spec, index
        )
        keys = batch.keys_of(decoder.spec, index)
        x = decoder.attention(batch.x.to(device), index, weights, batch.rows, keys)
        inputs = None if batch.inputs is None else batch.inputs.to(device)
        return decoder.feed_forward(x, index, weights, inputs)

    @torch.no_grad()
    def advance(self, flow: Flow) -> None:
        """The states of all windows become those behind the layer."""
        for batch in flow.batches:
            batch.x.copy_(self.run(batch))


class LayerTask:
    """A task for the training loop: one layer. The last `held` batches are only measured.

    An error d of a row's states costs d^T M d / 2, with M = `metric` [H, H], by default a multiple
    of one; `hold` adds to that what was known before.
    """

    def __init__(
        self,
        layer: Layer,
        given: Flow,
        wanted: Flow,
        *,
        held: int,
        batches: int,
        seed: int,
        metric: Tensor | None = None,
        hold: Hold | None = None,
    ) -> None:
        self._layer, self._given, self._wanted = layer, given.batches, wanted.batches
        self._taught = len(self._given) - held
        self._order = Order(count=self._taught, batch=batches, seed=seed)
        self._metric = self._plain() if metric is None else metric
        self._hold = hold

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self._layer.tensors.parameters

    def learn(self, step: int) -> Learned:
        index = self._order.of(step)
        self._layer.tensors.clear_gradients()
        loss = 0.0
        for number in index:
            found = self._loss(number) / len(index)
            found.backward()
            loss += float(found.detach())
        if self._hold is not None:
            self._hold.pull()
        return Learned(loss=loss, tokens=sum(len(self._given[i].x) for i in index))

    @torch.no_grad()
    def measure(self) -> float:
        held = range(self._taught, len(self._given))
        return sum(float(self._loss(number)) for number in held) / len(held)

    def _loss(self, number: int) -> Tensor:
        batch = self._given[number]
        found = self._layer.run(replace(batch, kept={**batch.kept}))
        wanted = self._wanted[number].x.to(found.device)
        errors = found - wanted
        return (errors @ self._metric).mul(errors).sum(-1).mean() / 2

    def _plain(self) -> Tensor:
        """By which a loss is the mean square of errors, over that of what the layer adds, about."""
        change = (self._wanted[-1].x - self._given[-1].x).square().sum(-1).mean()
        unit = torch.eye(self._wanted[-1].x.shape[-1], device=self._layer.device)
        return unit.mul_(2 / max(float(change), 1e-30))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """How every layer is taught: its task's `batches` of windows a step, `held` of all apart."""

    regimen: Regimen
    batches: int
    held: int
    seed: int


class Layerwise:
    """One job: `original` taught to the tensors that `start` stores, into `stages`."""

    def __init__(
        self,
        original: Source,
        start: Source,
        windows: Sequence[Sequence[int]],
        stages: Stages,
        lessons: Lessons,
        trainer: Trainer,
        *,
        at_once: int,
        known: Gathered | None = None,
    ) -> None:
        self._original, self._start, self._stages = original, start, stages
        self._lessons, self._trainer, self._known = lessons, trainer, known
        self._ops = ops = TrainingOps(trainer.device)
        flows = [Flow(original.spec, windows, stages.folder, at_once=at_once) for _ in range(2)]
        self._wanted, self._given = flows
        self._decoders = outer(original, ops), outer(start, ops)
        self._outcomes = _Outcomes(stages.folder)

    def run(self, tell: Callable[[str], Tell], job: Mapping[str, Any]) -> dict[str, Outcome]:
        """Trains what is not there yet; how each layer ended, by name."""
        with torch.no_grad():
            self._wanted.enter(self._decoders[0])
            self._given.enter(self._decoders[1])
        ended: dict[str, Outcome] = {}
        for stage, items in groupby(self._start.tensors(), lambda item: stage_of(item[0])):
            begun = dict(items)
            if not stage.startswith("layers."):
                if not self._stages.has(stage):
                    self._stages.save(stage, begun)
                continue
            original = {name: self._original.tensor(name) for name in begun}
            self._advance(self._wanted, self._decoders[0], stage, original)
            if not self._stages.has(stage):
                tensors = self._trainer.tensors(self._original.tensor, begun, self._known or {})
                outcome = self._train(stage, tensors, tell(stage), job)
                self._outcomes.save(stage, outcome)
                self._stages.save(stage, dict(tensors.results()))
            ended[stage] = self._outcomes.load(stage)
            made = dict(self._stages.load(stage))
            self._advance(self._given, self._decoders[1], stage, made)
        return ended

    def _train(self, stage: str, tensors: Tensors, tell: Tell, job: Mapping[str, Any]) -> Outcome:
        layer = Layer(self._decoders[1], self._ops, _number(stage), tensors)
        lessons, metric, hold = self._lessons, None, None
        if self._known is not None:
            metric = self._known.metric(stage, self._original.spec.hidden)
            hold = Hold(self._known, tensors, self._original.tensor, own=1.0)
        task = LayerTask(
            layer,
            self._given,
            self._wanted,
            held=lessons.held,
            batches=lessons.batches,
            seed=lessons.seed + _number(stage),
            metric=metric,
            hold=hold,
        )
        folder = self._stages.folder / stage
        outcome = train(
            task,
            self._trainer.optimizer(tensors),
            lessons.regimen,
            folder,
            job={**job, "layer": stage},
            tell=tell,
        )
        shutil.rmtree(folder)
        return outcome

    def _advance(
        self, flow: Flow, decoder: Decoder, stage: str, stored: Mapping[str, QTensor]
    ) -> None:
        Layer(decoder, self._ops, _number(stage), Tensors(stored, {})).advance(flow)


class _Outcomes:
    """How the layers ended that are done, for a run that goes on behind them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, stage: str, outcome: Outcome) -> None:
        data = json.dumps(asdict(outcome)).encode()
        write_file(self._place(stage), data)

    def load(self, stage: str) -> Outcome:
        return Outcome(**json.loads(self._place(stage).read_text(encoding="utf-8")))

    def _place(self, stage: str) -> Path:
        return self._folder / f"{stage}.json"


def _number(stage: str) -> int:
    return int(stage.split(".")[1])
