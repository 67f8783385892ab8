"""Proof of a plan: the model is loaded, its cache filled to the planned context, and the memory
that each part took is set beside what was planned.

The cache is seeded with zeros up to a chunk before its end; the last chunk and one token behind it
are computed by the real engine's step, so the largest buffers of a run are there. What a process
holds before (the interpreter, imports) is not counted, as in the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date

import numpy as np

from halfbyte.formats.checkpoint import Source
from halfbyte.formats.lora import Adapter
from halfbyte.kernels.contract import OpSet
from halfbyte.models.cache import Cache, Slot, shape_for
from halfbyte.models.decoder import Chunk, Decoder
from halfbyte.models.drafter import DraftModel
from halfbyte.models.load import load, load_drafter
from halfbyte.planner.calibration import Measurement, measurement
from halfbyte.planner.probe import resident_bytes
from halfbyte.specs import Plan, Setup
from halfbyte.text.tokenizer import Tokenizer

BOUND_BYTES = 32 * 2**20
BOUND_SHARE = 0.03
# What is measured together -> the beginnings of the planned components.
PARTS = {
    "weights": ("weights.", "adapters."),
    "drafter": ("drafter.weights.", "drafter.layout"),
    "text": ("runtime.text",),
    "kv": ("kv.",),
    "step": ("activations.", "drafter.step", "runtime.process", "runtime.cuda_context"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One part: the bytes planned, and those by which the process grew."""

    part: str
    planned_bytes: int
    measured_bytes: int

    @property
    def error_bytes(self) -> int:
        return self.measured_bytes - self.planned_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """The parts, and whether their sum is within the bound: 3 % or 32 MiB."""

    parts: tuple[Measured, ...]

    @property
    def total(self) -> Measured:
        return Measured(
            part="total",
            planned_bytes=sum(part.planned_bytes for part in self.parts),
            measured_bytes=sum(part.measured_bytes for part in self.parts),
        )

    @property
    def holds(self) -> bool:
        total = self.total
        return abs(total.error_bytes) <= max(BOUND_BYTES, BOUND_SHARE * total.planned_bytes)

    def told(self, plan: Plan, vocab: int, bandwidth: float | None) -> Measurement:
        """What later plans may learn of it: of what was planned exactly, the rest is measured."""
        parts = {part.part: part for part in self.parts}
        text, step = parts["text"], parts["step"]
        exact = step.planned_bytes - plan.part("runtime.process") - plan.part("runtime.cuda")
        return measurement(
            vocab=vocab,
            text_bytes=text.measured_bytes if text.planned_bytes else None,
            process_bytes=max(0, step.measured_bytes - exact),
            bandwidth=bandwidth,
            day=date.today(),
        )


def fill(
    source: Source,
    ops: OpSet,
    plan: Plan,
    *,
    drafter: Source | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> Filled:
    """Loads, fills and measures; with the drafter and the adapters that the plan counts."""
    meter = _Meter()
    decoder = load(source, ops, adapters=adapters)
    meter.read("weights")
    model = None if drafter is None else load_drafter(drafter, decoder)
    meter.read("drafter")
    tokenizer = None if source.assets is None else Tokenizer(source.assets)
    meter.read("text")
    setup = plan.setup
    cache = _cache(decoder, setup)
    cache.seed()
    meter.read("kv")
    run_at_the_end(decoder, cache, setup, model)
    meter.read("step")
    del tokenizer
    return Filled(
        parts=tuple(
            Measured(
                part=part,
                planned_bytes=sum(plan.part(beginning) for beginning in beginnings),
                measured_bytes=meter.grown[part],
            )
            for part, beginnings in PARTS.items()
        )
    )


def _cache(decoder: Decoder, setup: Setup) -> Cache:
    rows = min(setup.prefill_chunk, setup.context)
    shape = shape_for(context=setup.context, sequences=setup.sequences, rows=rows, kind=setup.kv)
    return decoder.new_cache(shape)


def run_at_the_end(
    decoder: Decoder, cache: Cache, setup: Setup, drafter: DraftModel | None = None
) -> None:
    """A full step and a round of drafts, or a decoded token, for every sequence at the end of the
    context."""
    pages = cache.shape.pages // setup.sequences
    last = min(1 + setup.draft, setup.context - 1)
    rows = min(setup.prefill_chunk, setup.context - last)
    slots = [
        Slot(pages=list(range(i * pages, (i + 1) * pages)), ring=i) for i in range(setup.sequences)
    ]
    for slot in slots:
        slot.length = slot.written = setup.context - rows - last
        decoder.forward([Chunk(slot=slot, token_ids=[1] * rows)], cache)
    if drafter is not None:
        states = np.zeros((len(slots), decoder.spec.hidden), dtype=np.float32)
        drafter.forward([1] * len(slots), states, slots, cache)
    ends = [Chunk(slot=slot, token_ids=[1] * last, wanted="all") for slot in slots]
    decoder.forward(ends, cache)


class _Meter:
    """By how much the process grew, part by part."""

    def __init__(self, now: Callable[[], int] = resident_bytes) -> None:
        self._now = now
        self._last = now()
        self.grown: dict[str, int] = {}

    def read(self, part: str) -> None:
        reached = self._now()
        self.grown[part] = reached - self._last
        self._last = reached
