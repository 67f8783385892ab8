"""What an op set takes, asked of the op set itself where it can say: packed weights, the cache, and
what a step computes.

The native op set and Triton's record the very program that will run, over weights that are not
there. The reference op set cannot be asked; its numbers are an upper estimate from shapes, and say
so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from halfbyte import env
from halfbyte.kernels.contract import KVLayout, Step
from halfbyte.kernels.cpu import CPUOps, CPUStep, instruction_set
from halfbyte.models.cache import CacheShape
from halfbyte.models.load import (
    TOKENS,
    Outlining,
    outline,
    outline_adapter,
    outline_drafter,
)
from halfbyte.planner.calibration import Calibration
from halfbyte.specs import Basis, DeviceKind, ModelSpec, Part, Row, Scheme, Setup

if TYPE_CHECKING:
    from halfbyte.formats.lora import Adapter
    from halfbyte.kernels.triton import Recorded

MIB = 2**20
# A CUDA context with PyTorch's kernels and cuBLAS's workspace.
CUDA_BYTES = 600 * MIB
# CUDA graphs of a handful of shapes of step, and the kernels that they launch.
GRAPHS_BYTES = 96 * MIB
# The reference op set keeps decoded weights up to this total.
DECODED_BYTES = 2**30
REFERENCE_ROWS = 32
INDEX_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A drafter beside a model: what a person calls it, what it is, and how it is stored."""

    name: str
    spec: ModelSpec
    schemes: Mapping[str, Scheme]

    @property
    def stored_bytes(self) -> int:
        """Without the whole numbers that stand for tokens."""
        return sum(
            self.schemes[tensor.name].bytes(tensor.shape)
            for tensor in self.spec.tensors()
            if not tensor.name.endswith(TOKENS)
        )


class Runtime(Protocol):
    """A model, or a `part` of it, on one op set, with its adapters. `basis` is that of
    `scratch_bytes`; `packed_bytes` are the model's own, `adapter_bytes` those of each adapter."""

    name: str
    part: Part
    basis: Basis
    packed_bytes: int
    adapter_bytes: tuple[int, ...]

    def kv_bytes(self, layout: KVLayout) -> int: ...

    def scratch_bytes(self, rows: int, wanted: int, setup: Setup) -> int:
        """What a step of so many rows, with logits for so many, computes at once."""
        ...

    def drafter_bytes(self, drafter: Companion, setup: Setup) -> tuple[int, int]:
        """What a drafter takes packed, and what a step of it computes for all sequences."""
        ...

    def overhead(self, calibration: Calibration) -> tuple[Row, ...]:
        """What is there before any model."""
        ...


def runtime_of(
    kind: DeviceKind,
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    *,
    adapters: Sequence[Adapter] = (),
    reference: bool = False,
    part: Part | None = None,
) -> Runtime:
    """The op set that would run a model, or a part of it, on a device of this kind, or the
    `reference`."""
    part = spec.whole if part is None else part
    native = kind == "cpu" and instruction_set() is not None and CPUOps.lacks(spec) is None
    if native and not reference:
        return NativeRuntime(spec, schemes, adapters, part)
    if kind == "cuda" and not reference:
        from halfbyte.kernels.triton import TritonOps  # only who asks for a card waits for it

        if TritonOps.lacks(spec) is None:
            return TritonRuntime(spec, schemes, adapters, part)
    return ReferenceRuntime(kind, spec, schemes, adapters, part)


class NativeRuntime:
    """The native CPU op set."""

    basis: Basis = "arithmetic"

    def __init__(
        self,
        spec: ModelSpec,
        schemes: Mapping[str, Scheme],
        adapters: Sequence[Adapter],
        part: Part,
    ) -> None:
        self._ops = ops = CPUOps(threads=env.thread_count() or env.processor_count())
        self.name, self.part = ops.name, part
        self.adapter_bytes = tuple(
            packed_adapter_bytes(it, spec, part, CPUOps(threads=1)) for it in adapters
        )
        self._decoder = outline(spec, schemes, ops, adapters, part=part)
        self.packed_bytes = ops.packed_bytes - sum(self.adapter_bytes)
        self._cache = self._decoder.new_cache(CacheShape(pages=1, ring_slack=1))
        self._step = _native(self._cache.step)

    def kv_bytes(self, layout: KVLayout) -> int:
        return CPUOps.kv_bytes(layout)

    def scratch_bytes(self, rows: int, wanted: int, setup: Setup) -> int:
        return self._step.scratch_bytes(rows, wanted)

    def drafter_bytes(self, drafter: Companion, setup: Setup) -> tuple[int, int]:
        before, rows = self._ops.packed_bytes, setup.sequences
        model = outline_drafter(drafter.spec, drafter.schemes, self._decoder, self._ops)
        packed = self._ops.packed_bytes - before
        step = _native(model.recorded(self._cache)).scratch_bytes(rows, rows)
        return packed, step + _spread_bytes(drafter.spec, rows)

    def overhead(self, calibration: Calibration) -> tuple[Row, ...]:
        return (_process(calibration),)


class TritonRuntime:
    """Triton's op set on a GPU."""

    basis: Basis = "arithmetic"

    def __init__(
        self,
        spec: ModelSpec,
        schemes: Mapping[str, Scheme],
        adapters: Sequence[Adapter],
        part: Part,
    ) -> None:
        from halfbyte.kernels.triton import TritonOps

        self._ops = ops = TritonOps()
        self.name, self.part = ops.name, part
        self.adapter_bytes = tuple(
            packed_adapter_bytes(it, spec, part, TritonOps()) for it in adapters
        )
        self._decoder = outline(spec, schemes, ops, adapters, part=part)
        self.packed_bytes = ops.packed_bytes - sum(self.adapter_bytes)
        self._cache = self._decoder.new_cache(CacheShape(pages=1, ring_slack=1))
        self._step = cast("Recorded", self._cache.step)

    def kv_bytes(self, layout: KVLayout) -> int:
        return self._ops.kv_bytes(layout)

    def scratch_bytes(self, rows: int, wanted: int, setup: Setup) -> int:
        cells = setup.sequences * setup.context
        return self._step.scratch_bytes(rows, wanted, setup.sequences, cells)

    def drafter_bytes(self, drafter: Companion, setup: Setup) -> tuple[int, int]:
        before, rows = self._ops.packed_bytes, setup.sequences
        model = outline_drafter(drafter.spec, drafter.schemes, self._decoder, self._ops)
        packed = self._ops.packed_bytes - before
        step = cast("Recorded", model.recorded(self._cache))
        cells = setup.sequences * setup.context
        return packed, step.scratch_bytes(rows, rows, rows, cells)

    def overhead(self, calibration: Calibration) -> tuple[Row, ...]:
        graphs = Row(
            component="runtime.graphs",
            bytes=GRAPHS_BYTES,
            basis="calibrated",
            note="recorded steps and compiled kernels; an estimate, not measured",
        )
        return (_cuda_context(), graphs)


class ReferenceRuntime:
    """Plain torch, on a CPU or a GPU: packed weights, the decoded ones that are kept, and one more
    decoded at a time."""

    basis: Basis = "calibrated"

    def __init__(
        self,
        kind: DeviceKind,
        spec: ModelSpec,
        schemes: Mapping[str, Scheme],
        adapters: Sequence[Adapter],
        part: Part,
    ) -> None:
        tensors = [*spec.held(part)]
        sizes = {tensor.name: tensor.count for tensor in tensors}
        self.name, self.part = f"reference ({kind})", part
        self.adapter_bytes = tuple(
            sum(
                update.bytes(adapter.stored.pairs[module][0].scheme)
                for module, update in adapter.updates.items()
                if spec.holds(part, update.weight)
            )
            for adapter in adapters
        )
        self._kind = kind
        self._spec = spec
        stored = sum(schemes[tensor.name].bytes(tensor.shape) for tensor in tensors)
        self.packed_bytes = stored + min(4 * sum(sizes.values()), DECODED_BYTES)
        self._largest = 4 * max(sizes.values())

    def kv_bytes(self, layout: KVLayout) -> int:
        each = {"f32": 4.0, "bf16": 2.0, "q8_0": 1.0 + 2 / 32}[layout.kind]
        kept = 2 if layout.key_rope is None else 1
        return int(kept * layout.num_cells * layout.kv_heads * layout.head_dim * each)

    def scratch_bytes(self, rows: int, wanted: int, setup: Setup) -> int:
        rows = max(rows, REFERENCE_ROWS)
        layers = self._spec.layers
        inner = max(layer.mlp.width for layer in layers)
        heads = max(layer.attention.query_width for layer in layers)
        step = 4 * rows * (6 * self._spec.hidden + 4 * inner + 4 * heads)
        return self._largest + step + 2 * 4 * max(wanted, REFERENCE_ROWS) * self._spec.vocab

    def drafter_bytes(self, drafter: Companion, setup: Setup) -> tuple[int, int]:
        rows = setup.sequences
        vocab = drafter.spec.drafter.head_rows if drafter.spec.drafter else 0
        step = 4 * max(rows, REFERENCE_ROWS) * vocab
        return drafter.stored_bytes, step + _spread_bytes(drafter.spec, rows)

    def overhead(self, calibration: Calibration) -> tuple[Row, ...]:
        return (_process(calibration),) if self._kind == "cpu" else (_cuda_context(),)


def _cuda_context() -> Row:
    return Row(
        component="runtime.cuda_context",
        bytes=CUDA_BYTES,
        basis="calibrated",
        note="a CUDA context and its libraries",
    )


def _native(step: Step) -> CPUStep:
    assert isinstance(step, CPUStep)
    return step


def _spread_bytes(drafter: ModelSpec, rows: int) -> int:
    """The tokens of a head's rows, where they are not the vocabulary in order, and logits in it."""
    apart = [tensor for tensor in drafter.tensors() if tensor.name.endswith(TOKENS)]
    if not apart:
        return 0
    return INDEX_BYTES * apart[-1].count + 4 * rows * drafter.vocab


def packed_adapter_bytes(adapter: Adapter, spec: ModelSpec, part: Part, ops: Outlining) -> int:
    """What a fresh op set keeps of what an adapter adds to a part."""
    return ops.packed_bytes if outline_adapter(adapter, spec, part, ops) else 0


def _process(calibration: Calibration) -> Row:
    return Row(
        component="runtime.process",
        bytes=calibration.process_bytes,
        basis="calibrated",
        note=f"threads and what the first steps allocate{calibration.noted}",
    )
