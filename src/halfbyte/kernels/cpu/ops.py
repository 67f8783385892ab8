"""The native CPU op set: ops are recorded into a program; afterwards a step is one native call.

Weights are repacked when a model is loaded (16 rows side by side, reversible bit for bit). The
inputs of block-quantized linears are rounded to int8 per 32 with an fp16 scale; everything else is
f32, keys and values are kept in bf16 or f32. Within its rounding of int8 halves (to even, where the
reference rounds away from zero) it agrees with `ReferenceOps(activations="q8_0")` to f32 accuracy,
and it keeps the determinism contract bit for bit: threads divide outputs, never sums.

What it is not: differentiable, or for other processors than x86-64 with AVX2. The kernels are in
csrc/.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.errors import UnsupportedError
from halfbyte.kernels.contract import Experts, Graph, KVLayout, Linear, Rows
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import (
    SCHEMES,
    Activation,
    AttentionSpec,
    ExpertSpec,
    KVType,
    ModelSpec,
    RopeSpec,
    Scheme,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

# In the order of csrc/kernels.h.
NATIVE = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_k", "q6_k")
CELLS: tuple[KVType, ...] = ("f32", "bf16", "q8_0")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh")
INSTRUCTION_SETS = ("avx512-vnni", "avx-vnni", "avx2")  # the fastest first
GROUP = 16
BANDWIDTH_BYTES = 1 << 28
NOTHING = np.zeros((0, 0), dtype=np.float32)
NO_ADAPTER = -1
POSITIONS = 1 << 18  # that tables of rotations are for, at least
Buffer = int


def native() -> Any:
    """The extension module, or None where it was not built."""
    return _imported()[0]


def instruction_set() -> str | None:
    """The fastest instruction set that is built and that this processor has; None if none."""
    module = native()
    if module is None:
        return None
    return next((name for name in INSTRUCTION_SETS if module.supports(name)), None)


def lacking(name: str) -> str | None:
    """Why the kernels of an instruction set cannot run here; None if they can."""
    module, failure = _imported()
    if failure is not None:
        return failure
    missing = module.lacking(name)
    return f"this processor has no {', '.join(missing)}" if missing else None


def _imported() -> tuple[Any, str | None]:
    """The extension module, or why there is none."""
    try:
        return importlib.import_module("halfbyte._cpu"), None
    except ModuleNotFoundError:
        return None, "not built: there was no C++ compiler, or this is no x86-64 processor"
    except ImportError as error:
        return None, f"built, but it cannot be loaded: {error}"


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A stored tensor in the native layout: a weight, or a vector of f32."""

    scheme: Scheme
    shape: tuple[int, ...]
    native: Any


class CPUOps:
    """See the contract. Ops may be called only inside `step`, which records them."""

    schemes = tuple(SCHEMES[name] for name in NATIVE)
    checks_finite = True

    def __init__(self, *, threads: int, instructions: str | None = None) -> None:
        self._native = native()
        found = instructions or instruction_set()
        if self._native is None or found is None:
            raise UnsupportedError("the native CPU kernels are not built, or not for this machine")
        self.instructions = found
        self.name = f"native CPU ({found})"
        self.packed_bytes = 0
        self._pool = self._native.Pool(threads)
        self._fresh: list[Any] = []
        self._rotations: dict[tuple[RopeSpec, int], Any] = {}
        self._program: Any = None
        self._softcap = 0.0

    @staticmethod
    def lacks(spec: ModelSpec) -> str | None:
        """What a model needs that is not here; None if it can run."""
        widths = {layer.experts.width for layer in spec.layers if layer.experts is not None}
        uneven = [size for size in (*widths, *([spec.hidden] if widths else [])) if size % GROUP]
        return f"experts of {uneven[0]} rows, no multiple of {GROUP}" if uneven else None

    def pack(self, q: QTensor) -> Packed:
        if len(q.shape) == 1:
            packed = self._native.Vector(q.data.view(np.float32).reshape(-1))
        else:
            scheme = NATIVE.index(q.scheme.name)
            packed = self._native.Weight(self._pool, scheme, q.num_rows, q.width, q.data)
            self._fresh.append(packed)
        self.packed_bytes += packed.nbytes
        return Packed(q.scheme, q.shape, packed)

    def is_finite(self, packed: Packed) -> bool:
        return packed.native.finite

    def outline(self, scheme: Scheme, shape: Sequence[int]) -> Packed:
        """A tensor that is not there, as it would be packed: it can be recorded, not run.

        It takes no memory, but counts in `packed_bytes`.
        """
        if len(shape) == 1:
            native = self._native.Vector(np.zeros(shape, np.float32))
        else:
            index = NATIVE.index(scheme.name)
            native = self._native.Weight(self._pool, index, prod(shape[:-1]), shape[-1])
        self.packed_bytes += native.nbytes
        return Packed(scheme, tuple(shape), native)

    def unpack(self, packed: Packed) -> QTensor:
        return QTensor(packed.scheme, packed.shape, packed.native.unpack())

    def read_bandwidth(self) -> float | None:
        return self._native.read_bandwidth(self._pool, self.instructions, BANDWIDTH_BYTES)

    @staticmethod
    def kv_bytes(layout: KVLayout) -> int:
        """What `new_kv` takes: values are padded to whole groups, q8_0 has an f32 scale per 32."""
        each = {"f32": 4, "bf16": 2, "q8_0": 1}[layout.kind]
        keys = layout.head_dim if layout.key_rope is None else 0
        values = -(-layout.head_dim // GROUP) * GROUP
        scales = 2 * 4 * (layout.head_dim // 32) if layout.kind == "q8_0" else 0
        return layout.kv_heads * layout.num_cells * ((keys + values) * each + scales)

    def new_kv(self, layout: KVLayout, key_norm: Packed | None = None) -> Any:
        if layout.kind == "q8_0" and layout.head_dim % 32:
            raise UnsupportedError(
                f"a q8_0 cache needs a head dim that is a multiple of 32, not {layout.head_dim}",
                hint="use --kv bf16",
            )
        return self._native.Cells(
            layout.kv_heads,
            layout.head_dim,
            layout.num_cells,
            layout.stride,
            layout.sliding,
            CELLS.index(layout.kind),
            _native_of(key_norm),
            None if layout.key_rope is None else self._rotations_of(layout.key_rope, layout),
        )

    def _rotations_of(self, rope: RopeSpec, layout: KVLayout) -> Any:
        """The rotations of positions, shared by all layers that make keys with this rope."""
        key = rope, max(layout.num_cells, POSITIONS)
        if key not in self._rotations:
            turns = frequencies(rope, layout.head_dim).tolist()
            self._rotations[key] = self._native.Rotations(turns, key[1])
        return self._rotations[key]

    def embed(self, rows: Rows, table: Packed, scale: float) -> Buffer:
        return self._program.embed(table.native, scale)

    def given(self, rows: Rows, width: int, start: int = 0) -> Buffer:
        assert start == 0, "native layers come first: they are given a drafter's states, or none"
        return self._program.given(width)

    def concat(self, first: Buffer, second: Buffer) -> Buffer:
        return self._program.concat(first, second)

    def rms_norm(self, x: Buffer, weight: Packed | None, eps: float) -> Buffer:
        return self._program.rms_norm(x, _native_of(weight), eps)

    def linear(self, x: Buffer, linear: Linear) -> Buffer:
        return self._program.linear(x, *self._product(linear))

    def rope_and_store(
        self,
        q: Buffer,
        k: Buffer,
        v: Buffer,
        *,
        q_norm: Packed | None,
        k_norm: Packed | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
        kv: Any,
    ) -> Buffer:
        return self._program.rope_and_store(
            q,
            k,
            v,
            _native_of(q_norm),
            _native_of(k_norm),
            self._attention(attention, eps),
            frequencies(attention.rope, attention.head_dim).tolist(),
            kv,
        )

    def rope(
        self,
        q: Buffer,
        *,
        q_norm: Packed | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
    ) -> Buffer:
        return self._program.rope(
            q,
            _native_of(q_norm),
            self._attention(attention, eps),
            frequencies(attention.rope, attention.head_dim).tolist(),
        )

    def attend(self, q: Buffer, *, attention: AttentionSpec, rows: Rows, kv: Any) -> Buffer:
        return self._program.attend(q, self._attention(attention, 0.0), kv)

    def residual(
        self,
        x: Buffer,
        update: Buffer,
        *,
        norm: Packed | None = None,
        eps: float = 0.0,
        scalar: Packed | None = None,
    ) -> Buffer:
        return self._program.residual(x, update, _native_of(norm), eps, _native_of(scalar))

    def gated_mlp(
        self, x: Buffer, *, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Buffer:
        inner = self._program.gated(
            x, *self._product(gate), *self._product(up), ACTIVATIONS.index(activation)
        )
        return self.linear(inner, down)

    def route_experts(
        self,
        x: Buffer,
        scores: Buffer,
        *,
        experts: Experts,
        spec: ExpertSpec,
        activation: Activation,
    ) -> Buffer:
        return self._program.route_experts(
            x,
            scores,
            experts.gate_up.native,
            experts.down.native,
            experts.scale.native,
            spec.used,
            spec.score_scale,
            ACTIVATIONS.index(activation),
        )

    def per_layer_inputs(
        self, tokens: Buffer, context: Buffer, *, norm: Packed, eps: float, scale: float
    ) -> Buffer:
        return self._program.per_layer_inputs(tokens, context, norm.native, eps, scale)

    def per_layer_update(
        self,
        x: Buffer,
        inputs: Buffer,
        layer: int,
        *,
        gate: Linear,
        out: Linear,
        activation: Activation,
    ) -> Buffer:
        width = gate.weight.shape[0]
        gated = self._program.gate_by(
            self.linear(x, gate), inputs, layer * width, ACTIVATIONS.index(activation)
        )
        return self.linear(gated, out)

    def select(self, x: Buffer, index: Sequence[int]) -> Buffer:
        return self._program.select(x)

    def logits(self, x: Buffer, head: Packed, softcap: float | None) -> Buffer:
        self._softcap = softcap or 0.0
        return self.linear(x, Linear(weight=head))

    def clustered_logits(self, x: Buffer, scores: Buffer, head: Packed, used: int) -> Buffer:
        return self._program.clusters(x, scores, head.native, used)

    def step(self, graph: Graph) -> CPUStep:
        """Records the graph; the step takes any number of rows."""
        self._program = program = self._native.Program(self._pool, self.instructions)
        self._softcap = 0.0
        program.finish(list(graph(Rows(token_ids=(), spans=()), ())), self._softcap)
        self._program = None
        return CPUStep(program, self._settle)

    def _settle(self) -> None:
        """Begins to move what was packed since the last time into large pages."""
        if self._fresh:
            self._native.settle(self._pool, self._fresh)
            self._fresh = []

    def _product(self, linear: Linear) -> tuple[Any, Any, list[Any]]:
        """The weight, the bias and the updates of a linear."""
        updates = [
            None if u is None else self._native.Update(u.a.native, u.b.native, u.scale)
            for u in linear.updates
        ]
        return linear.weight.native, _native_of(linear.bias), updates

    def _attention(self, attention: AttentionSpec, eps: float) -> Any:
        return self._native.Attention(
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            attention.window or 0,
            attention.scale,
            eps,
            attention.value_norm,
            attention.ahead,
        )


class CPUStep:
    """A recorded step. What it returns is overwritten by its next run.

    `settle` is called after every run: what makes the next ones faster should not delay the first.
    """

    def __init__(self, program: Any, settle: Callable[[], None]) -> None:
        self._program = program
        self._settle = settle

    def scratch_bytes(self, rows: int, wanted: int) -> int:
        """What steps of up to so many rows need for all that they compute, logits among it."""
        return self._program.scratch_bytes(rows, wanted)

    def __call__(self, rows: Rows, wanted: Sequence[int]) -> list[NDArray[np.float32]]:
        pages: list[int] = []
        spans: list[tuple[int, ...]] = []
        for span in rows.spans:
            adapter = NO_ADAPTER if span.adapter is None else span.adapter
            spans.append((span.start, span.count, span.ring, adapter, len(pages), len(span.pages)))
            pages.extend(span.pages)
        outputs = self._program.run(
            np.array(rows.token_ids, dtype=np.int32),
            np.array(spans, dtype=np.int32),
            np.array(pages, dtype=np.int32),
            np.array(wanted, dtype=np.int32),
            NOTHING if rows.states is None else np.ascontiguousarray(rows.states, np.float32),
        )
        self._settle()
        return outputs


def frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float32]:
    """[D / 2]: the angle of each pair per position, as the reference computes it, in f32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    divisors = np.ones(1) if rope.divisors is None else np.array(rope.divisors)
    return (frequency / divisors.astype(np.float32)).astype(np.float32)


def _native_of(packed: Packed | None) -> Any:
    return None if packed is None else packed.native
