"""Cells of values only: the keys made of them are those that would be stored, at any position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, oracle, relative_error, source_of

from halfbyte.families import spec_of
from halfbyte.kernels.contract import KVLayout, Linear, OpSet, Rows, Span
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.cpu.ops import INSTRUCTION_SETS, native
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ReferenceKV
from halfbyte.kernels.reference.rope import rotate, rotation
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import encode
from halfbyte.specs import SCHEMES, AttentionSpec, KVType, RopeSpec

HERE = [
    name for name in INSTRUCTION_SETS if instruction_set() is not None and native().supports(name)
]
OPS: dict[str, Callable[[], OpSet]] = {
    "reference": ReferenceOps,
    **{isa: lambda isa=isa: CPUOps(threads=2, instructions=isa) for isa in HERE},
}
VOCAB = 32
LENGTH = 200  # more than three tiles of positions
PROPORTIONAL = RopeSpec(theta=1e6, divisors=(1.0,) * 8 + (float("inf"),) * 24)
FULL = RopeSpec(theta=1e4)


def attention_of(rope: RopeSpec, head_dim: int = 64) -> AttentionSpec:
    return AttentionSpec(
        heads=6,
        kv_heads=2,
        head_dim=head_dim,
        rope=rope,
        scale=0.3,
        qk_norm=True,
        value_norm=True,
        shares_kv=True,
    )


def layout_of(attention: AttentionSpec, kind: KVType, key_rope: RopeSpec | None) -> KVLayout:
    return KVLayout(
        num_cells=64 * 5,
        stride=64,
        sliding=False,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        kind=kind,
        key_rope=key_rope,
    )


def run(
    ops: OpSet,
    attention: AttentionSpec,
    *,
    kind: KVType,
    values_only: bool,
    start: int = 0,
    sizes: tuple[int, ...] = (LENGTH,),
) -> np.ndarray:
    """Attention's output for rows from position `start` on; what is before them is zero."""
    numbers = torch.Generator().manual_seed(0)

    def packed(*shape: int) -> Any:
        return ops.pack(encode(torch.randn(shape, generator=numbers), SCHEMES["f32"]))

    table = packed(VOCAB, 16)
    q, k = (
        Linear(weight=packed(width, 16)) for width in (attention.query_width, attention.kv_width)
    )
    q_norm, k_norm = packed(attention.head_dim), packed(attention.head_dim)
    layout = layout_of(attention, kind, attention.rope if values_only else None)
    kv = ops.new_kv(layout, k_norm)

    def graph(rows: Rows, wanted: Any) -> Any:
        x = ops.embed(rows, table, 1.0)
        key = ops.linear(x, k)
        turned = ops.rope_and_store(
            ops.linear(x, q),
            key,
            key,
            q_norm=q_norm,
            k_norm=k_norm,
            attention=attention,
            eps=1e-6,
            rows=rows,
            kv=kv,
        )
        return [ops.attend(turned, attention=attention, rows=rows, kv=kv)]

    step = ops.step(graph)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, VOCAB, LENGTH)]
    pages = [4] * (start // 64) + [2, 0, 3, 1, 4]
    parts: list[np.ndarray] = []
    for first, last in pairwise(np.cumsum((0, *sizes))):
        span = Span(start=start + int(first), count=int(last - first), pages=pages, ring=0)
        parts.append(step(Rows(token_ids=ids[first:last], spans=[span]), ())[0].copy())
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("start", "rows", "bound"), [(0, 200, 2e-6), (4032, 200, 2e-6), (261_888, 8, 1e-4)]
)
@pytest.mark.parametrize("rope", [PROPORTIONAL, FULL], ids=["proportional", "full"])
@pytest.mark.parametrize("isa", HERE)
def test_keys_are_those_that_would_be_stored(
    isa: str, rope: RopeSpec, start: int, rows: int, bound: float
) -> None:
    """Of the angle that rounding adds, the square is left out: that is what shows far away."""
    attention = attention_of(rope)
    stored, made = (
        run(OPS[isa](), attention, kind="f32", values_only=alone, start=start, sizes=(rows,))
        for alone in (False, True)
    )
    assert relative_error(made, stored) < bound


@pytest.mark.parametrize("rope", [PROPORTIONAL, FULL], ids=["proportional", "full"])
def test_keys_of_the_reference_are_those_that_would_be_stored(rope: RopeSpec) -> None:
    stored, made = (
        run(ReferenceOps(), attention_of(rope), kind="f32", values_only=alone)
        for alone in (False, True)
    )
    assert np.array_equal(made, stored)


@pytest.mark.parametrize("rope", [PROPORTIONAL, FULL], ids=["proportional", "full"])
def test_keys_made_of_bf16_values_are_as_exact_as_bf16_keys(rope: RopeSpec) -> None:
    numbers = torch.Generator().manual_seed(0)
    values, norm = torch.randn(LENGTH, 2, 64, generator=numbers), torch.rand(64, generator=numbers)
    exact = rotate(values * norm, *rotation(torch.arange(LENGTH), rope, 64))
    span = Span(start=0, count=LENGTH, pages=[2, 0, 3, 1], ring=0)
    errors: list[float] = []
    for key_rope in (None, rope):
        kv = ReferenceKV(layout_of(attention_of(rope), "bf16", key_rope), "cpu", norm)
        kv.write(Rows(token_ids=[0] * LENGTH, spans=[span]), exact, values)
        keys, kept = kv.read(span, 0, LENGTH)
        assert torch.equal(kept, values.bfloat16().float())
        errors.append(float((keys - exact).square().mean()))
    assert 0 < errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("name", OPS)
def test_attention_over_bf16_values_is_about_as_exact_as_over_both(name: str) -> None:
    attention = attention_of(PROPORTIONAL)
    exact = run(OPS[name](), attention, kind="f32", values_only=False)
    stored, made = (
        run(OPS[name](), attention, kind="bf16", values_only=alone) for alone in (False, True)
    )
    # The error of a key is no longer independent of its value's.
    assert 0 < np.square(made - exact).mean() < 1.3 * np.square(stored - exact).mean()


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("rope", [PROPORTIONAL, FULL], ids=["proportional", "full"])
def test_a_row_has_the_same_bits_in_any_chunk(isa: str, rope: RopeSpec) -> None:
    attention = attention_of(rope)
    outputs = [
        run(
            CPUOps(threads=threads, instructions=isa),
            attention,
            kind="bf16",
            values_only=True,
            sizes=sizes,
        )
        for threads, sizes in ((1, (1,) * LENGTH), (2, (LENGTH,)), (3, (63, 2, 128, 7)))
    ]
    assert np.array_equal(outputs[0], outputs[1]) and np.array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
def test_a_model_keeps_values_only_where_keys_are_made_of_them(name: str, kind: KVType) -> None:
    config = {**CONFIGS["gemma4-31b"], "head_dim": 32}
    source = source_of(oracle(config), config)
    decoder = load(source, OPS[name]())
    cache = decoder.new_cache(CacheShape(pages=4, ring_slack=64, kind=kind))
    for kv, layer in zip(cache.layers, source.spec.layers, strict=True):
        attention = layer.attention
        if attention.window is None:
            each = 4 if kind == "f32" else 2
            assert kv.nbytes == each * 256 * attention.kv_width
    ids = [3, 1, 4, 1, 5, 9, 2, 6] * 6
    logits = decoder.forward([Chunk(slot=Slot(pages=[2]), token_ids=ids, wanted="all")], cache)
    exact = decoder.new_cache(CacheShape(pages=4, ring_slack=64, kind="f32"))
    theirs = decoder.forward(
        [Chunk(slot=Slot(pages=[0]), token_ids=ids, wanted="all")], exact
    ).copy()
    assert relative_error(logits, theirs) < 5e-2


def test_which_layers_keep_values_only() -> None:
    shape = CacheShape(pages=1)
    for name, full in (("gemma4-unified", True), ("gemma4-own-values", False), ("qwen3", False)):
        for layer in spec_of(CONFIGS[name]).layers:
            made = shape.layout(layer).key_rope is not None
            assert made == (full and layer.attention.window is None)
    layer = spec_of(CONFIGS["gemma4-unified"]).layers[1]
    for change in ({"value_norm": False}, {"qk_norm": False}, {"window": 64}, {"head_dim": 48}):
        changed = replace(layer, attention=replace(layer.attention, **change))  # type: ignore[arg-type]
        assert shape.layout(changed).key_rope is None


@pytest.mark.skipif(not HERE, reason="no native kernels here")
def test_malformed_cells_raise_before_native_code() -> None:
    norm, rotations = native().Vector(np.ones(64, np.float32)), native().Rotations([1.0] * 32, 4096)
    for kind, sliding, dim, weight in (
        (2, False, 64, norm),
        (1, True, 64, norm),
        (1, False, 128, norm),
        (1, False, 64, None),
        (1, False, 64, native().Vector(np.ones(32, np.float32))),
    ):
        with pytest.raises(ValueError, match="cannot be made"):
            native().Cells(1, dim, 64, 64, sliding, kind, weight, rotations)
    with pytest.raises(ValueError, match="cannot be made"):
        native().Cells(1, 64, 8192, 64, False, 1, norm, rotations)
    with pytest.raises(ValueError, match="groups of 16"):
        native().Rotations([1.0] * 24, 64)
    with pytest.raises(ValueError, match="beyond any"):
        run(CPUOps(threads=1), attention_of(FULL), kind="f32", values_only=True, start=2**18 - 64)
