"""What an op set takes, asked of the op set itself where it can say: packed weights, the cache, and
what a step computes.

The native op set records the very program that will run, over weights that are not there. The
reference op set cannot be asked; its numbers are an upper estimate from shapes, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from halfbyte import env
from halfbyte.kernels.contract import KVLayout
from halfbyte.kernels.cpu import CPUOps, CPUStep, instruction_set
from halfbyte.models.cache import CacheShape
from halfbyte.models.load import outline
from halfbyte.specs import Basis, DeviceKind, ModelSpec, Row, Scheme

MIB = 2**20
# What one entry of a vocabulary takes in the tokenizer's tables: 680 to 990 bytes were measured.
TEXT_BYTES = 750
# Threads, arenas and what the first steps allocate once.
PROCESS_BYTES = 6 * MIB
# A CUDA context with PyTorch's kernels and cuBLAS's workspace.
CUDA_BYTES = 600 * MIB
# The reference op set keeps decoded weights up to this total.
DECODED_BYTES = 2**30
REFERENCE_ROWS = 32


class Runtime(Protocol):
    """One model on one op set. `basis` is that of `scratch_bytes`."""

    name: str
    basis: Basis
    packed_bytes: int

    def kv_bytes(self, layout: KVLayout) -> int: ...

    def scratch_bytes(self, rows: int, wanted: int) -> int:
        """What a step of so many rows, with logits for so many, computes at once."""
        ...

    def overhead(self) -> tuple[Row, ...]:
        """What is there before any model."""
        ...


def runtime_of(
    kind: DeviceKind, spec: ModelSpec, schemes: Mapping[str, Scheme], *, reference: bool = False
) -> Runtime:
    """The op set that would run a model on a device of this kind, or the `reference`."""
    native = kind == "cpu" and instruction_set() is not None and CPUOps.lacks(spec) is None
    if native and not reference:
        return NativeRuntime(spec, schemes)
    return ReferenceRuntime(kind, spec, schemes)


class NativeRuntime:
    """The native CPU op set."""

    basis: Basis = "arithmetic"

    def __init__(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> None:
        ops = CPUOps(threads=env.thread_count() or env.processor_count())
        decoder = outline(spec, schemes, ops)
        self.name = ops.name
        self.packed_bytes = ops.packed_bytes
        step = decoder.new_cache(CacheShape(pages=1, ring_slack=1)).step
        assert isinstance(step, CPUStep)
        self._step = step

    def kv_bytes(self, layout: KVLayout) -> int:
        return CPUOps.kv_bytes(layout)

    def scratch_bytes(self, rows: int, wanted: int) -> int:
        return self._step.scratch_bytes(rows, wanted)

    def overhead(self) -> tuple[Row, ...]:
        return (_process(),)


class ReferenceRuntime:
    """Plain torch, on a CPU or a GPU: packed weights, the decoded ones that are kept, and one more
    decoded at a time."""

    basis: Basis = "calibrated"

    def __init__(self, kind: DeviceKind, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> None:
        sizes = {tensor.name: tensor.count for tensor in spec.tensors()}
        self.name = f"reference ({kind})"
        self._kind = kind
        self._spec = spec
        stored = sum(schemes[tensor.name].bytes(tensor.shape) for tensor in spec.tensors())
        self.packed_bytes = stored + min(4 * sum(sizes.values()), DECODED_BYTES)
        self._largest = 4 * max(sizes.values())

    def kv_bytes(self, layout: KVLayout) -> int:
        each = {"f32": 4.0, "bf16": 2.0, "q8_0": 1.0 + 2 / 32}[layout.kind]
        kept = 2 if layout.key_rope is None else 1
        return int(kept * layout.num_cells * layout.kv_heads * layout.head_dim * each)

    def scratch_bytes(self, rows: int, wanted: int) -> int:
        rows = max(rows, REFERENCE_ROWS)
        layers = self._spec.layers
        inner = max(layer.mlp.width for layer in layers)
        heads = max(layer.attention.query_width for layer in layers)
        step = 4 * rows * (6 * self._spec.hidden + 4 * inner + 4 * heads)
        return self._largest + step + 2 * 4 * max(wanted, REFERENCE_ROWS) * self._spec.vocab

    def overhead(self) -> tuple[Row, ...]:
        if self._kind == "cpu":
            return (_process(),)
        note = "a CUDA context and its libraries"
        cuda = Row(
            component="runtime.cuda_context", bytes=CUDA_BYTES, basis="calibrated", note=note
        )
        return (cuda,)


def _process() -> Row:
    return Row(
        component="runtime.process",
        bytes=PROCESS_BYTES,
        basis="calibrated",
        note="threads and what the first steps allocate",
    )
