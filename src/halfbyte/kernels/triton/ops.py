"""The Triton op set: ops are recorded into a program, which is laid out and launched for a step.

Weights are repacked when a model is loaded (`layout`), reversibly. Activations are f32; products
take operands in bf16 and add up in f32, as `ReferenceOps(activations="bf16")` does, whose results
these agree with to f32 accuracy; attention rounds its operands to bf16, too. With operands in f32
nothing is rounded. The determinism contract is kept by the order of sums, which is written down in
`products` and `heads`.

Recording (`linears`, `attending`, `experts`, `drawing`) fuses what it can see: a norm with the
residual before it, products of one input with each other, the gate of an MLP with its up
projection, and rounding with whatever made the numbers. Each fusion computes the same expressions,
so it changes no bit.

What it is not: differentiable. Without a device it only records, for plans, and loads neither torch
nor Triton. On a CPU it runs in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.contract import Experts, Graph, KVLayout, Linear, Rows
from halfbyte.kernels.cpu.ops import frequencies
from halfbyte.kernels.triton import attending, cells, drawing, linears
from halfbyte.kernels.triton.cells import TritonKV
from halfbyte.kernels.triton.experts import clustered, routed
from halfbyte.kernels.triton.layout import MATRICES, Packed, packed_bytes
from halfbyte.kernels.triton.program import Buffer, Program, Table, power
from halfbyte.kernels.triton.recording import (
    BLOCK,
    INTERPRETED,
    Recording,
    by_block,
    by_row,
    shaped,
    tiling_of,
)
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import (
    SCHEMES,
    Activation,
    AttentionSpec,
    ExpertSpec,
    ModelSpec,
    RopeSpec,
    Scheme,
)

if TYPE_CHECKING:
    from halfbyte.kernels.triton.device import Device
    from halfbyte.kernels.triton.step import TritonStep

Operands = Literal["bf16", "f32"]


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step without a device: it can be asked, not run."""

    program: Program

    def scratch_bytes(self, rows: int, wanted: int, sequences: int, cells: int) -> int:
        """What steps need for all that they are given and compute, logits among it: `cells` are
        those of a layer that sees everything."""
        program = self.program
        states = 4 * power(rows) * program.states_width
        return program.nbytes(rows, wanted, sequences, cells) + states

    def __call__(self, rows: Rows, wanted: Sequence[int]) -> Sequence[NDArray[np.float32]]:
        raise AssertionError("an outline of a step was run")


class TritonOps:
    """See the contract. Ops may be called only inside `step`, which records them."""

    schemes = MATRICES
    checks_finite = True

    def __init__(
        self,
        device: Device | None = None,
        *,
        operands: Operands = "bf16",
        capability: tuple[int, int] | None = None,
    ) -> None:
        """Without a device, `capability` is that of the card to record for, if it matters."""
        self.device = device
        self.name = f"Triton ({operands} operands)"
        self.packed_bytes = 0
        if device is not None:
            capability = device.capability
        interpreted = device is not None and device.interpreted
        self._tiling = INTERPRETED if interpreted else tiling_of(capability)
        self._operand = device.operand(operands) if device is not None else operands
        self._frequencies: dict[tuple[RopeSpec, int], Packed] = {}
        self._current: Recording | None = None

    @staticmethod
    def lacks(spec: ModelSpec) -> str | None:
        """What a model needs that is not here; None if it can run."""
        odd = [layer.attention.head_dim for layer in spec.layers if layer.attention.head_dim % 2]
        return f"heads of {odd[0]}, an odd number" if odd else None

    # Weights and cells.

    def reserve(self, tensors: Sequence[tuple[Scheme, Sequence[int]]]) -> None:
        """Takes the memory of tensors that will be packed next in one piece."""
        if self.device is not None:
            self.device.reserve(sum(packed_bytes(scheme, shape) for scheme, shape in tensors))

    def pack(self, q: QTensor) -> Packed:
        assert self.device is not None, "an op set without a device only outlines"
        self.packed_bytes += packed_bytes(q.scheme, q.shape)
        return Packed(q.scheme, q.shape, self.device.pack(q))

    def outline(self, scheme: Scheme, shape: Sequence[int]) -> Packed:
        """A tensor that is not there; it takes no memory, but counts in `packed_bytes`."""
        self.packed_bytes += packed_bytes(scheme, shape)
        return Packed(scheme, tuple(shape))

    def unpack(self, packed: Packed) -> QTensor:
        assert self.device is not None, "an outline holds nothing"
        return self.device.unpack(packed.data, packed.scheme, packed.shape)

    def is_finite(self, packed: Packed) -> bool:
        assert self.device is not None, "an outline holds nothing"
        return self.device.is_finite(packed.data, packed.scheme, packed.shape)

    def read_bandwidth(self) -> float | None:
        return None if self.device is None else self.device.read_bandwidth()

    @staticmethod
    def kv_bytes(layout: KVLayout) -> int:
        """What `new_kv` takes."""
        return cells.bytes_of(layout)

    def new_kv(self, layout: KVLayout, key_norm: Packed | None = None) -> TritonKV:
        cells.check(layout)
        made = layout.key_rope is not None
        assert key_norm is not None or not made, "cells of values only need the norm of the keys"
        data = None if self.device is None else self.device.zeros(self.kv_bytes(layout))
        return TritonKV(layout, data, key_norm if made else None)

    # The step.

    def step(self, graph: Graph) -> TritonStep | Recorded:
        """Records the graph; the step takes any number of rows."""
        program = self._recorded(graph)
        if self.device is None:
            return Recorded(program)
        from halfbyte.kernels.triton.step import TritonStep

        return TritonStep(program, self.device)

    def _recorded(self, graph: Graph) -> Program:
        self._current = Recording(self._operand, self._tiling)
        outputs = graph(Rows(token_ids=(), spans=()), ())
        program, self._current = self._current.program, None
        program.finish(outputs)
        if outputs and outputs[0].axis != "fixed":
            drawing.choose(program, outputs[0], self._tiling)
        return program

    @property
    def _recording(self) -> Recording:
        assert self._current is not None, "ops are recorded inside of `step`"
        return self._current

    # The ops.

    def embed(self, rows: Rows, table: Packed, scale: float) -> Buffer:
        out = Buffer("rows", table.width)
        self._recording.launch(
            "embedded",
            "rows",
            by_block("rows", table.width),
            ids=Table("ids"),
            table=table,
            out=out,
            other=None,
            scale=scale,
            width=table.width,
            **shaped(table),
            BLOCK=BLOCK,
            OPERAND=self._operand,
        )
        return out

    def given(self, rows: Rows, width: int, start: int = 0) -> Buffer:
        program = self._recording.program
        program.states_width = max(program.states_width, start + width)
        return self._recording.placed(
            Table("states"),
            Buffer("rows", width),
            width,
            x_width=Table("states_width"),
            x_start=start,
        )

    def concat(self, first: Buffer, second: Buffer) -> Buffer:
        out = Buffer(first.axis, first.width + second.width)
        self._recording.placed(first, out, first.width, part=True)
        return self._recording.placed(second, out, second.width, start=first.width, part=True)

    def rms_norm(self, x: Buffer, weight: Packed | None, eps: float) -> Buffer:
        out = Buffer(x.axis, x.width)
        launch, name = self._recording.program.maker(x) or (None, "")
        if launch is not None and launch.kernel == "joined" and name == "out":
            arguments = launch.arguments
            if not arguments["THEN"]:
                arguments |= {"then_norm": weight, "then_out": out, "then_eps": eps, "THEN": True}
                return out
        self._recording.launch(
            "normed",
            x.axis,
            by_row(x.axis),
            x=x,
            weight=weight,
            out=out,
            other=None,
            width=x.width,
            eps=eps,
            BLOCK=power(x.width),
            OPERAND=self._operand,
        )
        return out

    def linear(self, x: Buffer, linear: Linear) -> Buffer:
        alone = bool(linear.updates)
        y = linears.product(self._recording, x, linear.weight, linear.bias, alone=alone)
        for index, update in enumerate(linear.updates):
            if update is not None:
                linears.update(self._recording, y, x, update, index)
        return y

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
        kv: TritonKV,
    ) -> Buffer:
        stored = attending.Stored(k, v, k_norm, kv)
        angles = self._angles(attention)
        return attending.turned(self._recording, q, q_norm, attention, eps, angles, stored)

    def rope(
        self,
        q: Buffer,
        *,
        q_norm: Packed | None,
        attention: AttentionSpec,
        eps: float,
        rows: Rows,
    ) -> Buffer:
        angles = self._angles(attention)
        return attending.turned(self._recording, q, q_norm, attention, eps, angles, None)

    def attend(self, q: Buffer, *, attention: AttentionSpec, rows: Rows, kv: TritonKV) -> Buffer:
        return attending.attended(self._recording, q, attention, kv, self._angles(attention))

    def residual(
        self,
        x: Buffer,
        update: Buffer,
        *,
        norm: Packed | None = None,
        eps: float = 0.0,
        scalar: Packed | None = None,
    ) -> Buffer:
        out = Buffer(x.axis, x.width)
        self._recording.launch(
            "joined",
            x.axis,
            by_row(x.axis),
            x=x,
            update=update,
            norm=norm,
            scalar=scalar,
            out=out,
            other=None,
            then_norm=None,
            then_out=None,
            then_other=None,
            width=x.width,
            eps=eps,
            then_eps=0.0,
            NORMED=norm is not None,
            THEN=False,
            BLOCK=power(x.width),
            OPERAND=self._operand,
            writes=("out", "other", "then_out", "then_other"),
        )
        return out

    def gated_mlp(
        self, x: Buffer, *, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Buffer:
        recording = self._recording
        alike = gate.weight.scheme == up.weight.scheme and bool(gate.bias) == bool(up.bias)
        if alike and not gate.updates and not up.updates:
            inner = linears.gated(recording, x, gate, up, activation)
        else:
            gates, ups = self.linear(x, gate), self.linear(x, up)
            inner = linears.gated_by(recording, gates, ups, 0, activation)
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
        return routed(self._recording, x, scores, experts, spec, activation)

    def per_layer_inputs(
        self, tokens: Buffer, context: Buffer, *, norm: Packed, eps: float, scale: float
    ) -> Buffer:
        out, width = Buffer(tokens.axis, tokens.width), norm.width
        layers = tokens.width // width
        self._recording.launch(
            "layer_inputs",
            tokens.axis,
            by_row(tokens.axis, layers),
            tokens=tokens,
            context=context,
            norm=norm,
            out=out,
            other=None,
            layers=layers,
            width=width,
            eps=eps,
            scale=scale,
            BLOCK=power(width),
            OPERAND=self._operand,
        )
        return out

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
        inner = self.linear(x, gate)
        start = layer * inner.width
        return self.linear(linears.gated_by(self._recording, inner, inputs, start, activation), out)

    def select(self, x: Buffer, index: Sequence[int]) -> Buffer:
        out = Buffer("wanted", x.width)
        return self._recording.placed(x, out, x.width, index=Table("wanted"))

    def logits(self, x: Buffer, head: Packed, softcap: float | None) -> Buffer:
        return linears.product(self._recording, x, head, None, alone=True, softcap=softcap)

    def clustered_logits(self, x: Buffer, scores: Buffer, head: Packed, used: int) -> Buffer:
        return clustered(self._recording, x, scores, head, used)

    def _angles(self, attention: AttentionSpec) -> Packed:
        """The angles of a layer's pairs, on the device once."""
        key = attention.rope, attention.head_dim
        if key not in self._frequencies:
            angles: NDArray[np.float32] = frequencies(*key)
            q = QTensor(SCHEMES["f32"], (len(angles),), angles.view(np.uint8)[None])
            data = None if self.device is None else self.device.pack(q)
            self._frequencies[key] = Packed(q.scheme, q.shape, data)
        return self._frequencies[key]
