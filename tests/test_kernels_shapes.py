"""Malformed calls of the native module raise before any kernel runs: a table of every entry."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from native_steps import random_weight

from halfbyte.kernels.cpu import instruction_set
from halfbyte.kernels.cpu.ops import ACTIVATIONS, CELLS, NATIVE, native

if instruction_set() is None:
    pytest.skip(
        "the native kernels are not built, or not for this machine", allow_module_level=True
    )

F32, Q8_0, Q4_0, Q4_K = (NATIVE.index(name) for name in ("f32", "q8_0", "q4_0", "q4_k"))
HUGE = 2**31 - 1


def weight(rows: int, cols: int, scheme: str = "f32") -> Any:
    data = random_weight(scheme, rows, cols).data
    return native().Weight(native().Pool(1), NATIVE.index(scheme), rows, cols, data)


def vector(width: int) -> Any:
    return native().Vector(np.ones(width, np.float32))


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def unaligned(kind: type, count: int) -> np.ndarray:
    array = np.frombuffer(bytearray(1 + 4 * count), np.uint8)[1:].view(kind)
    assert not array.flags.aligned and array.flags.c_contiguous
    return array


def cells(heads: int = 2, dim: int = 32, count: int = 128, sliding: bool = False) -> Any:
    return native().Cells(heads, dim, count, 64, sliding, CELLS.index("f32"))


def attention(window: int = 0, heads: int = 4, kv_heads: int = 2, dim: int = 32) -> Any:
    return native().Attention(heads, kv_heads, dim, window, 1.0, 1e-6, False, 0)


ANGLES = [1.0] * 16


class Recording(SimpleNamespace):
    """A program that has begun: `x` and `q` [128], `k` and `v` [64], `few` selected rows."""

    def __init__(self) -> None:
        self.program = p = native().Program(native().Pool(2), instruction_set())
        self.weight = weight
        self.x = p.embed(weight(40, 128), 1.0)
        self.q = p.linear(self.x, weight(128, 128), None, [])
        self.k = p.linear(self.x, weight(64, 128), None, [])
        self.v = p.linear(self.x, weight(64, 128), None, [])
        self.few = p.select(self.x)

    def stored(self, window: int = 0, kept: Any = None) -> Any:
        """The program with its attention recorded."""
        a, kept = attention(window), kept or cells(sliding=window > 0)
        self.program.rope_and_store(self.q, self.k, self.v, None, None, a, ANGLES, kept)
        self.program.attend(self.q, a, kept)
        return self.program

    def finished(self, window: int = 0, kept: Any = None) -> Any:
        self.stored(window, kept).finish([self.few], 0.0)
        return self.program


def run(
    program: Any,
    ids: Any = (1,),
    spans: Any = ((0, 1, 0, -1, 0, 1),),
    pages: Any = (0,),
    wanted: Any = (0,),
    given: Any = ((),),
) -> Any:
    """Runs a step; tuples become arrays of the right kind."""
    arrays = [a if isinstance(a, np.ndarray) else numbers(*a) for a in (ids, pages, wanted)]
    spans = spans if isinstance(spans, np.ndarray) else np.array(spans, np.int32).reshape(-1, 6)
    given = given if isinstance(given, np.ndarray) else np.array(given, np.float32)
    return program.run(arrays[0], spans, arrays[1], arrays[2], given)


def mistyped(call: Callable[[Any], Any]) -> Any:
    return call, TypeError


MODULE: dict[str, tuple[Any, ...]] = {
    "lacking": (mistyped(lambda m: m.lacking(1)), mistyped(lambda m: m.lacking(None))),
    "supports": (mistyped(lambda m: m.supports(1)), mistyped(lambda m: m.supports(None))),
    "read_bandwidth": (
        lambda m: m.read_bandwidth(m.Pool(1), "sse2", 1 << 20),
        lambda m: m.read_bandwidth(m.Pool(1), instruction_set(), 255),
        mistyped(lambda m: m.read_bandwidth(m.Pool(1), instruction_set(), -1)),
        mistyped(lambda m: m.read_bandwidth(None, instruction_set(), 1 << 20)),
    ),
    "settle": (
        lambda m: m.settle(m.Pool(1), [None]),
        mistyped(lambda m: m.settle(m.Pool(1), [vector(4)])),
        mistyped(lambda m: m.settle(None, [])),
    ),
    "Pool": (lambda m: m.Pool(0), lambda m: m.Pool(-3), lambda m: m.Pool(1 << 20)),
    "Weight": (
        mistyped(lambda m: m.Weight(None, F32, 1, 1, np.zeros((1, 4), np.uint8))),
        lambda m: m.Weight(m.Pool(1), -1, 1, 1, np.zeros((1, 4), np.uint8)),
        lambda m: m.Weight(m.Pool(1), len(NATIVE), 1, 1, np.zeros((1, 4), np.uint8)),
        lambda m: m.Weight(m.Pool(1), F32, 0, 1, np.zeros((0, 4), np.uint8)),
        lambda m: m.Weight(m.Pool(1), F32, -1, 1, np.zeros((1, 4), np.uint8)),
        lambda m: m.Weight(m.Pool(1), F32, HUGE, HUGE, np.zeros((1, 4), np.uint8)),
        lambda m: m.Weight(m.Pool(1), F32, 2, 4, np.zeros((1, 16), np.uint8)),
        lambda m: m.Weight(m.Pool(1), F32, 1, 4, np.zeros((1, 15), np.uint8)),
        mistyped(lambda m: m.Weight(m.Pool(1), F32, 1, 4, np.zeros(16, np.uint8))),
        mistyped(lambda m: m.Weight(m.Pool(1), F32, 1, 4, np.zeros((1, 16), np.int8))),
        mistyped(lambda m: m.Weight(m.Pool(1), F32, 1, 16, np.zeros((1, 16), np.float32))),
        mistyped(lambda m: m.Weight(m.Pool(1), F32, 1, 4, np.zeros((1, 32), np.uint8)[:, ::2])),
        mistyped(lambda m: m.Weight(m.Pool(1), F32, 1, 4, None)),
        lambda m: m.Weight(m.Pool(1), Q4_0, 1, 40, np.zeros((1, 18), np.uint8)),
        lambda m: m.Weight(m.Pool(1), Q8_0, 1, 31, np.zeros((1, 0), np.uint8)),
        lambda m: m.Weight(m.Pool(1), Q4_K, 1, 288, np.zeros((1, 144), np.uint8)),
        lambda m: m.Weight(m.Pool(1), Q4_K, 1, 32),
        lambda m: m.Weight(m.Pool(1), F32, 16, 16).unpack(),
    ),
    "Vector": (
        mistyped(lambda m: m.Vector(np.ones((2, 2), np.float32))),
        mistyped(lambda m: m.Vector(np.ones(4))),
        mistyped(lambda m: m.Vector(np.ones(4, np.int32))),
        mistyped(lambda m: m.Vector(np.ones(8, np.float32)[::2])),
        lambda m: m.Vector(np.ones(0, np.float32)),
        lambda m: m.Vector(unaligned(np.float32, 4)),
        mistyped(lambda m: m.Vector(None)),
    ),
    "Cells": (
        lambda m: m.Cells(0, 32, 64, 64, False, 0),
        lambda m: m.Cells(-1, 32, 64, 64, False, 0),
        lambda m: m.Cells(HUGE, 1024, 1 << 30, 64, False, 0),
        lambda m: m.Cells(1, 0, 64, 64, False, 0),
        lambda m: m.Cells(1, 33, 64, 64, False, 0),
        lambda m: m.Cells(1, 2048, 64, 64, False, 0),
        lambda m: m.Cells(1, 48, 64, 64, False, CELLS.index("q8_0")),
        lambda m: m.Cells(1, 32, 0, 64, True, 0),
        mistyped(lambda m: m.Cells(1, 32, -64, 64, True, 0)),
        lambda m: m.Cells(1, 32, 1 << 40, 64, True, 0),
        lambda m: m.Cells(1, 32, 96, 64, False, 0),
        lambda m: m.Cells(1, 32, 96, 48, False, 0),
        lambda m: m.Cells(1, 32, 64, 0, False, 0),
        lambda m: m.Cells(1, 32, 64, -64, False, 0),
        lambda m: m.Cells(1, 32, 64, 64, False, -1),
        lambda m: m.Cells(1, 32, 64, 64, False, len(CELLS)),
        lambda m: m.Cells(1, 32, 64, 64, False, 0, None, m.Rotations([1.0] * 16, 64)),
        lambda m: m.Cells(1, 32, 64, 64, False, 0, vector(16), m.Rotations([1.0] * 16, 64)),
        lambda m: m.Cells(1, 64, 64, 64, False, 0, vector(64), m.Rotations([1.0] * 16, 64)),
        lambda m: m.Cells(1, 32, 128, 64, False, 0, vector(32), m.Rotations([1.0] * 16, 64)),
        lambda m: m.Cells(1, 32, 64, 64, True, 0, vector(32), m.Rotations([1.0] * 16, 64)),
    ),
    "Rotations": (
        lambda m: m.Rotations([], 64),
        lambda m: m.Rotations([1.0] * 15, 64),
        lambda m: m.Rotations([1.0] * 1024, 64),
        lambda m: m.Rotations([1.0] * 16, 1 << 40),
        mistyped(lambda m: m.Rotations([1.0] * 16, -1)),
    ),
    "Attention": (
        lambda m: attention(heads=0),
        lambda m: attention(kv_heads=0),
        lambda m: attention(kv_heads=-2),
        lambda m: attention(heads=4, kv_heads=3),
        lambda m: attention(heads=2, kv_heads=4),
        lambda m: attention(heads=1 << 20, kv_heads=1),
        lambda m: attention(dim=0),
        lambda m: attention(dim=31),
        lambda m: attention(dim=2048),
        lambda m: attention(window=-1),
        lambda m: m.Attention(4, 2, 32, 0, 1.0, 1e-6, False, -1),
        lambda m: m.Attention(4, 2, 32, 0, 1.0, 1e-6, False, HUGE),
    ),
    "Update": (
        lambda m: m.Update(weight(4, 64), weight(64, 5), 1.0),
        lambda m: m.Update(weight(4, 64, "q4_0"), weight(64, 4), 1.0),
        lambda m: m.Update(weight(32, 64), weight(64, 32, "q8_0"), 1.0),
        mistyped(lambda m: m.Update(None, weight(64, 4), 1.0)),
    ),
    "Program": (
        lambda m: m.Program(m.Pool(1), "sse2"),
        lambda m: m.Program(m.Pool(1), ""),
        mistyped(lambda m: m.Program(None, instruction_set())),
    ),
}

PROGRAM: dict[str, tuple[Any, ...]] = {
    "embed": (
        mistyped(lambda r: r.program.embed(None, 1.0)),
        lambda r: r.finished().embed(weight(40, 128), 1.0),
    ),
    "given": (
        lambda r: r.program.given(0),
        lambda r: r.program.given(-5),
        lambda r: [r.program.given(8), r.program.given(8)],
        lambda r: r.finished().given(8),
    ),
    "concat": (
        lambda r: r.program.concat(r.x, 99),
        lambda r: r.program.concat(-1, r.x),
        lambda r: r.program.concat(r.x, r.few),
    ),
    "rms_norm": (
        lambda r: r.program.rms_norm(r.x, vector(127), 1e-6),
        lambda r: r.program.rms_norm(-1, None, 1e-6),
        lambda r: r.program.rms_norm(HUGE, None, 1e-6),
        mistyped(lambda r: r.program.rms_norm(2**40, None, 1e-6)),
        lambda r: r.finished().rms_norm(r.x, None, 1e-6),
    ),
    "linear": (
        lambda r: r.program.linear(r.x, weight(8, 64), None, []),
        lambda r: r.program.linear(r.x, weight(8, 128), vector(7), []),
        mistyped(lambda r: r.program.linear(r.x, None, None, [])),
        lambda r: r.program.linear(99, weight(8, 128), None, []),
        lambda r: r.program.linear(
            r.x, weight(8, 128), None, [native().Update(weight(2, 64), weight(8, 2), 1.0)]
        ),
        lambda r: r.program.linear(
            r.x, weight(8, 128), None, [native().Update(weight(2, 128), weight(9, 2), 1.0)]
        ),
        lambda r: [r.program.linear(r.x, weight(8, 128), None, [None] * count) for count in (1, 2)],
    ),
    "gated": (
        lambda r: r.program.gated(r.x, weight(8, 64), None, [], weight(8, 64), None, [], 0),
        lambda r: r.program.gated(r.x, weight(8, 128), None, [], weight(9, 128), None, [], 0),
        lambda r: r.program.gated(
            r.x, weight(8, 128), None, [], weight(8, 128, "q4_0"), None, [], 0
        ),
        lambda r: r.program.gated(r.x, weight(8, 128), vector(9), [], weight(8, 128), None, [], 0),
        lambda r: r.program.gated(
            r.x, weight(8, 128), None, [], weight(8, 128), None, [], len(ACTIVATIONS)
        ),
        lambda r: r.program.gated(r.x, weight(8, 128), None, [], weight(8, 128), None, [], -1),
    ),
    "rope_and_store": (
        lambda r: r.program.rope_and_store(r.k, r.k, r.v, None, None, attention(), ANGLES, cells()),
        lambda r: r.program.rope_and_store(r.q, r.q, r.v, None, None, attention(), ANGLES, cells()),
        lambda r: r.program.rope_and_store(r.x, r.k, r.v, None, None, attention(), ANGLES, cells()),
        lambda r: r.program.rope_and_store(
            r.q, r.k, r.v, None, None, attention(), ANGLES[1:], cells()
        ),
        lambda r: r.program.rope_and_store(
            r.q, r.k, r.v, vector(31), None, attention(), ANGLES, cells()
        ),
        lambda r: r.program.rope_and_store(
            r.q, r.k, r.v, None, vector(33), attention(), ANGLES, cells()
        ),
        lambda r: r.program.rope_and_store(
            r.q, r.k, r.v, None, None, attention(), ANGLES, cells(heads=1)
        ),
        lambda r: r.program.rope_and_store(
            r.q, r.k, r.v, None, None, attention(), ANGLES, cells(sliding=True)
        ),
        mistyped(
            lambda r: r.program.rope_and_store(r.q, r.k, r.v, None, None, attention(), ANGLES, None)
        ),
        # One head for all keys and values: queries, keys and values are the same buffer.
        lambda r: r.program.rope_and_store(
            r.q, r.q, r.q, None, None, attention(kv_heads=4), ANGLES, cells(heads=4)
        ),
    ),
    "rope": (
        lambda r: r.program.rope(r.k, None, attention(), ANGLES),
        lambda r: r.program.rope(r.x, None, attention(), ANGLES),
        lambda r: r.program.rope(r.q, None, attention(), [*ANGLES, 1.0]),
        lambda r: r.program.rope(r.q, vector(128), attention(), ANGLES),
        lambda r: r.program.rope(
            r.program.linear(r.few, weight(128, 128), None, []), None, attention(), ANGLES
        ),
    ),
    "attend": (
        lambda r: r.program.attend(r.k, attention(), cells()),
        lambda r: r.program.attend(r.q, attention(), cells(heads=1)),
        lambda r: r.program.attend(r.q, attention(), cells(dim=64)),
        lambda r: r.program.attend(r.q, attention(), cells(sliding=True)),
        lambda r: r.program.attend(r.q, attention(window=8), cells()),
        lambda r: r.program.attend(r.q, attention(window=65), cells(sliding=True)),
        lambda r: [
            r.program.attend(r.q, attention(), native().Cells(2, 32, 256, stride, False, 0))
            for stride in (64, 128)
        ],
    ),
    "route_experts": (
        lambda r: experts(r, used=0),
        lambda r: experts(r, used=5),
        lambda r: experts(r, scores=r.k),
        lambda r: experts(r, gate_up=(4 * 2 * 32 - 1, 128)),
        lambda r: experts(r, gate_up=(4 * 2 * 32, 64)),
        lambda r: experts(r, down=(4 * 128, 40)),
        lambda r: experts(r, down=(4 * 127, 32)),
        lambda r: experts(r, activation=2),
    ),
    "per_layer_inputs": (
        lambda r: r.program.per_layer_inputs(r.x, r.k, vector(16), 1e-6, 1.0),
        lambda r: r.program.per_layer_inputs(r.x, r.q, vector(17), 1e-6, 1.0),
        lambda r: r.program.per_layer_inputs(r.few, r.few, vector(16), 1e-6, 1.0),
        mistyped(lambda r: r.program.per_layer_inputs(r.x, r.q, None, 1e-6, 1.0)),
    ),
    "gate_by": (
        lambda r: r.program.gate_by(r.k, r.x, 65, 0),
        lambda r: r.program.gate_by(r.k, r.x, -1, 0),
        lambda r: r.program.gate_by(r.k, r.x, HUGE, 0),
        lambda r: r.program.gate_by(r.k, r.x, 0, 9),
        lambda r: r.program.gate_by(r.few, r.x, 0, 0),
    ),
    "residual": (
        lambda r: r.program.residual(r.x, r.k, None, 0.0, None),
        lambda r: r.program.residual(r.x, r.few, None, 0.0, None),
        lambda r: r.program.residual(r.x, r.q, vector(64), 0.0, None),
        lambda r: r.program.residual(r.x, r.q, None, 0.0, vector(2)),
    ),
    "select": (
        lambda r: r.program.select(r.few),
        lambda r: r.program.select(99),
    ),
    "clusters": (
        lambda r: r.program.clusters(r.x, r.k, weight(64 * 16, 128), 0),
        lambda r: r.program.clusters(r.x, r.k, weight(64 * 16, 128), 65),
        lambda r: r.program.clusters(r.x, r.k, weight(64 * 8, 128), 2),
        lambda r: r.program.clusters(r.x, r.k, weight(64 * 16, 64), 2),
        lambda r: r.program.clusters(r.few, r.k, weight(64 * 16, 128), 2),
    ),
    "finish": (
        lambda r: r.program.finish([], 0.0),
        lambda r: r.program.finish([99], 0.0),
        lambda r: r.program.finish([r.few], 30.0),
        lambda r: r.finished().finish([r.few], 0.0),
    ),
    "scratch_bytes": (mistyped(lambda r: r.finished().scratch_bytes(2**40, 1)),),
    "run": (
        lambda r: run(r.program),
        lambda r: run(r.finished(), ids=(40,)),
        lambda r: run(r.finished(), ids=(-1,)),
        mistyped(lambda r: run(r.finished(), ids=np.array([1], np.int64))),
        mistyped(lambda r: run(r.finished(), ids=np.array([1.0]))),
        mistyped(lambda r: run(r.finished(), ids=np.arange(4, dtype=np.int32)[::2])),
        lambda r: run(r.finished(), ids=unaligned(np.int32, 1)),
        lambda r: run(r.finished(), ids=(1, 2)),
        lambda r: run(r.finished(), ids=()),
        lambda r: run(r.finished(), wanted=(1,)),
        lambda r: run(r.finished(), wanted=(-1,)),
        mistyped(lambda r: run(r.finished(), wanted=np.zeros(1, np.uint8))),
        lambda r: run(r.finished(), spans=np.zeros((1, 5), np.int32)),
        lambda r: run(r.finished(), spans=numbers(0, 1, 0, -1, 0, 1)),
        mistyped(lambda r: run(r.finished(), spans=np.zeros((1, 6), np.float32))),
        lambda r: run(r.finished(), spans=((-1, 1, 0, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, 0, 0, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, -1, 0, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((64, 1, 0, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((HUGE, 1, 0, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, -1, -1, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, 0, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -2, 0, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, -1, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, 1, 1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, 0, 2),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, 0, -1),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, HUGE, HUGE),)),
        lambda r: run(r.finished(), spans=((0, 1, 0, -1, 0, 1), (0, 1, 0, -1, 0, 1))),
        lambda r: run(r.finished(), pages=(2,)),
        lambda r: run(r.finished(), pages=(-1,)),
        mistyped(lambda r: run(r.finished(), pages=np.array([0], np.int16))),
        lambda r: run(r.finished(window=8), spans=((0, 1, 2, -1, 0, 0),)),
        lambda r: run(r.finished(window=8), ids=[1] * 65, spans=((0, 65, 0, -1, 0, 0),)),
        lambda r: run(r.finished(window=8), ids=[1] * 58, spans=((100, 58, 0, -1, 0, 0),)),
        lambda r: run(r.finished(window=8), spans=((1 << 30, 1, 0, -1, 0, 0),)),
        lambda r: run_given(r, np.zeros((1, 7), np.float32)),
        lambda r: run_given(r, np.zeros((2, 8), np.float32)),
        mistyped(lambda r: run_given(r, np.zeros((1, 8)))),
        mistyped(lambda r: run_given(r, np.zeros((1, 16), np.float32)[:, ::2])),
        lambda r: run_outline(),
    ),
}


def experts(
    r: Recording,
    *,
    scores: int | None = None,
    gate_up: tuple[int, int] = (4 * 2 * 32, 128),
    down: tuple[int, int] = (4 * 128, 32),
    used: int = 2,
    activation: int = 0,
) -> Any:
    """A mixture of four experts of width 32."""
    p = r.program
    scores = p.linear(r.x, weight(4, 128), None, []) if scores is None else scores
    return p.route_experts(
        r.x, scores, weight(*gate_up), weight(*down), vector(4), used, 1.0, activation
    )


def run_given(r: Recording, states: np.ndarray) -> Any:
    states_given = r.program.given(8)
    r.program.finish([states_given], 0.0)
    return run(r.program, given=states)


def run_outline() -> Any:
    program = native().Program(native().Pool(1), instruction_set())
    outline = native().Weight(native().Pool(1), F32, 40, 128)
    program.finish([program.embed(outline, 1.0)], 0.0)
    return run(program)


def cases(table: dict[str, Any]) -> list[Any]:
    """(call, error): ValueError, or TypeError where it is marked as mistyped."""
    return [
        pytest.param(*(call if isinstance(call, tuple) else (call, ValueError)), id=f"{name}-{i}")
        for name, calls in table.items()
        for i, call in enumerate(calls)
    ]


@pytest.mark.parametrize(("call", "error"), cases(MODULE))
def test_the_module_refuses(call: Callable[[Any], Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        call(native())


@pytest.mark.parametrize(("call", "error"), cases(PROGRAM))
def test_a_program_refuses(call: Callable[[Recording], Any], error: type[Exception]) -> None:
    recording = Recording()
    with pytest.raises(error):
        call(recording)


def test_every_entry_point_is_in_the_tables() -> None:
    assert {name for name in vars(native()) if not name.startswith("_")} == set(MODULE)
    methods = {name for name in vars(native().Program) if not name.startswith("_")}
    assert methods == set(PROGRAM)


def test_what_the_tables_spoil_is_good() -> None:
    """Each refusal above is of one thing: without it, the same calls pass."""
    r = Recording()
    p = r.stored()
    p.attend(
        p.rope(p.linear(r.x, weight(128, 128), None, []), None, attention(), ANGLES),
        attention(),
        cells(),
    )
    experts(r)
    p.clusters(r.x, r.k, weight(64 * 16, 128), 2)
    p.gate_by(r.k, p.per_layer_inputs(r.x, r.q, vector(16), 1e-6, 1.0), 64, 1)
    p.residual(p.concat(r.k, r.v), r.x, vector(128), 1e-6, vector(1))
    p.gated(r.x, weight(8, 128), vector(8), [], weight(8, 128), vector(8), [], 1)
    logits = p.linear(r.few, weight(40, 128), vector(40), [])
    p.finish([logits, r.few], 30.0)
    (found, states) = run(p, wanted=(0, 0))
    assert found.shape == (2, 40) and states.shape == (2, 128)
    assert np.isfinite(found).all() and np.abs(found).max() <= 30


def test_a_ring_takes_what_it_holds() -> None:
    for start, count in ((0, 64), (3, 61), (100, 57)):
        spans = ((start, count, 1, -1, 0, 0),)
        run(Recording().finished(window=8), ids=[1] * count, spans=spans)


def test_the_smallest_cache_counts() -> None:
    r = Recording()
    p = r.stored(kept=cells(count=128))
    p.attend(r.q, attention(), cells(count=64))
    p.finish([r.few], 0.0)
    run(p, pages=(0,))
    with pytest.raises(ValueError, match="page"):
        run(p, pages=(1,))
