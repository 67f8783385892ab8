"""Extreme numbers through every native op: the reference's results within a stated bound.

Rows of zeros, of one huge outlier, of denormals, of numbers whose squares overflow. An infinity or
a NaN that comes in comes out: never as a number that looks sane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from native_steps import BLOCKS, LARGEST, Floats, Product, plain_weight, random_weight, rows_of

from halfbyte.kernels.contract import Experts, KVLayout, Linear, LowRank
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.cpu.ops import CELLS, INSTRUCTION_SETS, NATIVE, native
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.numerics.codec import decode
from halfbyte.numerics.qtensor import QTensor
from halfbyte.specs import SCHEMES, AttentionSpec, ExpertSpec, RopeSpec

if instruction_set() is None:
    pytest.skip(
        "the native kernels are not built, or not for this machine", allow_module_level=True
    )

HERE = [name for name in INSTRUCTION_SETS if native().supports(name)]
ULP = 2.0**-23
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy: overflows are meant


def extremes(width: int, seed: int = 0) -> dict[str, Floats]:
    """Rows [width] by name."""
    numbers = np.random.default_rng(seed)
    normal = numbers.standard_normal(width).astype(np.float32)
    spread = 10.0 ** numbers.uniform(-38, 38, width) * np.sign(normal)
    special = {name: normal.copy() for name in ("outlier", "inf", "-inf", "nan")}
    special["outlier"] *= 1e-3
    special["outlier"][width // 3] = 6e4
    for name in ("inf", "-inf", "nan"):
        special[name][width // 3] = float(name)
    plain = {
        "zero": np.zeros(width),
        "-zero": -np.zeros(width),
        "normal": normal,
        "equal": np.full(width, -0.1),
        "small": normal * 1e-20,
        "large": normal * 1e15,
        "overflowing": normal * 1e30,
        "denormal": normal * 1e-41,
        "spread": spread,
    }
    return {name: row.astype(np.float32) for name, row in (plain | special).items()}


FINITE = [name for name in extremes(16) if name not in ("inf", "-inf", "nan")]


def both(
    isa: str,
    tables: Sequence[Floats],
    graph: Callable[..., Any],
    pages: Sequence[int] = (0,),
    adapter: int | None = None,
) -> tuple[Floats, Floats]:
    """What `graph(ops, rows, *x)` makes of the tables' rows: natively, and by the reference."""
    results = []
    rows = rows_of(range(len(tables[0])), pages, adapter)
    for ops in (CPUOps(threads=2, instructions=isa), ReferenceOps()):
        packed = [ops.pack(plain_weight("f32", table)) for table in tables]

        def whole(rows: Any, wanted: Any, ops: Any = ops, packed: Any = packed) -> Any:
            return (graph(ops, rows, *(ops.embed(rows, table, 1.0) for table in packed)),)

        results.append(np.array(ops.step(whole)(rows, range(len(tables[0])))[0]))
    return results[0], results[1]


def assert_agree(
    ours: Floats, theirs: Floats, names: Sequence[str], bound: float, least: float = 1e-45
) -> None:
    """Within `bound` of a row's largest number or `least`; finite where the reference is finite."""
    wrong: dict[str, Any] = {}
    for name, a, b in zip(names, ours.astype(np.float64), theirs, strict=True):
        finite = np.isfinite(b)
        error = np.abs(a - b)[finite].max(initial=0) / np.abs(b[finite]).max(initial=least)
        if not np.array_equal(np.isfinite(a), finite) or not error <= bound:
            wrong[name] = error
    assert wrong == {}


def vector(ops: Any, width: int, seed: int = 5) -> Any:
    return ops.pack(
        plain_weight("f32", np.random.default_rng(seed).normal(1, 1, width).astype(np.float32))
    )


def identity(ops: Any, width: int) -> Linear:
    return Linear(weight=ops.pack(plain_weight("f32", np.eye(width, dtype=np.float32))))


def adapted(ops: Any) -> Linear:
    """Nothing but what an adapter of rank 4 adds."""
    a, b = (
        plain_weight("f32", w)
        for w in (weights_of(1, WIDTH)[0, :4], weights_of(1, WIDTH)[0, :, :4])
    )
    update = LowRank(a=ops.pack(a), b=ops.pack(b), scale=-0.5)
    nothing = plain_weight("f32", np.zeros((WIDTH, WIDTH), np.float32))
    return Linear(weight=ops.pack(nothing), updates=[update])


def weights_of(count: int, width: int) -> Floats:
    return np.random.default_rng(3).standard_normal((count, width, width), dtype=np.float32)


WIDTH = 100
CAP = 30.0
ROW_OPS: dict[str, Callable[..., Any]] = {
    "norm": lambda o, rows, x, y: o.rms_norm(x, vector(o, WIDTH), 1e-6),
    "plain norm": lambda o, rows, x, y: o.rms_norm(x, None, 1e-6),
    "residual": lambda o, rows, x, y: o.residual(x, y),
    "normed residual": lambda o, rows, x, y: o.residual(
        x, y, norm=vector(o, WIDTH), eps=1e-5, scalar=vector(o, 1)
    ),
    "silu": lambda o, rows, x, y: o.per_layer_update(
        x, y, 0, gate=identity(o, WIDTH), out=identity(o, WIDTH), activation="silu"
    ),
    "gelu": lambda o, rows, x, y: o.per_layer_update(
        x, y, 0, gate=identity(o, WIDTH), out=identity(o, WIDTH), activation="gelu_tanh"
    ),
    "per layer": lambda o, rows, x, y: o.per_layer_inputs(
        x, y, norm=vector(o, 25), eps=1e-6, scale=0.25
    ),
    "adapter": lambda o, rows, x, y: o.linear(x, adapted(o)),
    "softcap": lambda o, rows, x, y: o.logits(x, identity(o, WIDTH).weight, CAP),
}


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("op", ROW_OPS)
def test_row_ops(op: str, isa: str) -> None:
    names = list(extremes(WIDTH))
    x = np.stack(list(extremes(WIDTH).values()))
    y = np.stack(list(extremes(WIDTH, 1).values()))
    ours, theirs = both(isa, [x, y], ROW_OPS[op], adapter=0 if op == "adapter" else None)
    # The cap is a difference from it: small numbers have its absolute error.
    assert_agree(ours, theirs, names, 3e-6, least=CAP if op == "softcap" else 1e-45)


def mlp(o: Any, rows: Any, x: Any, y: Any) -> Any:
    weights = [plain_weight("f32", 0.1 * w) for w in weights_of(3, WIDTH)]
    gate, up, down = (Linear(weight=o.pack(weight)) for weight in weights)
    return o.gated_mlp(x, gate=gate, up=up, down=down, activation="silu")


def experts(o: Any, rows: Any, x: Any, y: Any) -> Any:
    """Four experts of width 32; the scores are the first four numbers of each row of y."""
    numbers = np.random.default_rng(4).standard_normal
    scores = o.linear(
        y, Linear(weight=o.pack(plain_weight("f32", np.eye(4, 96, dtype=np.float32))))
    )
    parts = Experts(
        gate_up=o.pack(stacked(numbers((4, 64, 96), np.float32))),
        down=o.pack(stacked(numbers((4, 96, 32), np.float32))),
        scale=vector(o, 4),
    )
    spec = ExpertSpec(count=4, used=2, width=32, score_scale=0.1)
    return o.route_experts(x, scores, experts=parts, spec=spec, activation="gelu_tanh")


def stacked(values: Floats) -> QTensor:
    return QTensor(
        SCHEMES["f32"], values.shape, values.reshape(-1, values.shape[-1]).view(np.uint8)
    )


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize(("graph", "width"), [(mlp, WIDTH), (experts, 96)])
def test_mlps(graph: Callable[..., Any], width: int, isa: str) -> None:
    x = np.stack(list(extremes(width).values()))
    y = np.stack(list(extremes(width, 1).values()))
    ours, theirs = both(isa, [x, y], graph)
    assert_agree(ours, theirs, list(extremes(width)), 1e-5)


@pytest.mark.parametrize("isa", HERE)
def test_clusters(isa: str) -> None:
    rows = extremes(64)
    x, y = np.stack(list(rows.values())), np.zeros((len(rows), 64), np.float32)
    y[:, :8] = (0, -0.0, 3e38, -1e-41, 3e38, -3e38, -1, 0)

    def graph(o: Any, rows: Any, x: Any, y: Any) -> Any:
        head = o.pack(plain_weight("f32", weights_of(4, 64).reshape(-1, 64)[:128]))
        scores = o.linear(
            y, Linear(weight=o.pack(plain_weight("f32", np.eye(8, 64, dtype=np.float32))))
        )
        return o.clustered_logits(x, scores, head, 3)

    ours, theirs = both(isa, [x, y], graph)
    assert_agree(ours, theirs, list(rows), 1e-5)


@pytest.mark.parametrize("isa", HERE)
def test_scores_of_experts_that_are_equal_or_far_apart(isa: str) -> None:
    x = np.random.default_rng(6).standard_normal((6, 96), dtype=np.float32)
    y = np.zeros_like(x)
    y[1, :4] = (0, 1e30, 1e30, -1e30)
    y[2, :4] = (-1e30, -2e30, -1e30, -3e30)
    y[3, :4] = (-0.0, 0, -0.0, 0)
    y[4, :4] = (5e3, 5e3, 5e3, 5e3)
    y[5, 2] = np.nan
    ours, theirs = both(isa, [x, y], experts)
    assert_agree(ours, theirs, [str(row) for row in range(6)], 1e-5)


def scaled(scheme: str, kind: str) -> QTensor:
    """A stored weight [37, 512] whose scales, or numbers, are extreme."""
    weight = random_weight(scheme, 37, 512)
    if scheme not in LARGEST:
        numbers = np.random.default_rng(2).standard_normal((37, 512), dtype=np.float32)
        factor = {"zero": 0.0, "denormal": 1e-7, "negative": -1.0, "largest": 1e4}[kind]
        return plain_weight(scheme, numbers * np.float32(factor))
    data = weight.data.reshape(37, -1, SCHEMES[scheme].block_bytes).copy()
    bits = {"zero": 0, "denormal": 1, "negative": 0xB800, "largest": 0x7BFF}[kind]
    for offset in BLOCKS[scheme][1]:
        data[..., offset : offset + 2] = np.array([bits], np.uint16).view(np.uint8)
    return QTensor(weight.scheme, weight.shape, data.reshape(37, -1))


def rounded(x: Floats) -> np.ndarray:
    """int8 per 32 with an fp16 scale, halves to even, in f64; NaN where the scale is infinite."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    half = scale.astype(np.float16).astype(np.float64)
    values = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=half > 0))
    return np.where(np.isfinite(half), values * half, np.nan).reshape(x.shape)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("scheme", NATIVE)
@pytest.mark.parametrize("kind", ["zero", "denormal", "negative", "largest"])
def test_products(kind: str, scheme: str, isa: str) -> None:
    q = scaled(scheme, kind)
    rows = extremes(512)
    x = np.stack(list(rows.values()))
    weight = decode(q).double().numpy()
    whole = SCHEMES[scheme].block > 1
    with np.errstate(all="ignore"):
        taken = rounded(x) if whole else x.astype(np.float64)
        exact = taken @ weight.T
    ours = Product(CPUOps(threads=2, instructions=isa), q, x)()
    assert np.array_equal(
        ours, Product(CPUOps(threads=1, instructions=isa), q, x)(), equal_nan=True
    )
    steps = (512 // 32 if whole else 512) + 4  # roundings of a sum
    for name, a, b, t in zip(rows, ours, exact, taken, strict=True):
        size = np.abs(t).sum() * np.abs(weight).max()
        if not np.isfinite(size):
            assert not np.isfinite(a).any(), name
        elif size < np.finfo(np.float32).max:
            assert (np.abs(a - b) <= steps * ULP * size + 1e-44).all(), name


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("scheme", NATIVE)
@pytest.mark.parametrize("kind", ["zero", "denormal", "negative", "largest"])
def test_embeddings(kind: str, scheme: str, isa: str) -> None:
    q = scaled(scheme, kind)
    ops = CPUOps(threads=1, instructions=isa)
    table = ops.pack(q)
    step = ops.step(lambda rows, wanted: (ops.embed(rows, table, 1.0),))
    np.testing.assert_allclose(step(rows_of(range(37)), ())[0], decode(q).numpy(), rtol=3e-7)


POSITIONS, EXTREME, DIM = 128, 30, 64
TOO_LARGE = ("large", "overflowing", "spread")  # for the f16 scales of a q8_0 cache


def attention(window: int | None) -> AttentionSpec:
    return AttentionSpec(
        heads=4, kv_heads=2, head_dim=DIM, rope=RopeSpec(theta=1e4), scale=0.125, window=window
    )


def attended(window: int | None, kind: Any) -> Callable[..., Any]:
    """Attention of all positions of one sequence; the queries come from a product."""
    spec = attention(window)
    stride = 128 if window else 64
    layout = KVLayout(
        num_cells=128,
        stride=stride,
        sliding=window is not None,
        kv_heads=2,
        head_dim=DIM,
        kind=kind,
    )

    def graph(o: Any, rows: Any, q: Any, k: Any, v: Any) -> Any:
        kv, q = o.new_kv(layout), o.linear(q, identity(o, 4 * DIM))
        turned = o.rope_and_store(
            q, k, v, q_norm=None, k_norm=None, attention=spec, eps=1e-6, rows=rows, kv=kv
        )
        return o.attend(turned, attention=spec, rows=rows, kv=kv)

    return graph


def sequence(which: str, name: str) -> list[Floats]:
    """Queries, keys and values of a sequence; position EXTREME of one of them is extreme."""
    numbers = np.random.default_rng(9).standard_normal
    tables = {
        part: numbers((POSITIONS, heads * DIM), np.float32)
        for part, heads in (("queries", 4), ("keys", 2), ("values", 2))
    }
    tables[which][EXTREME] = extremes(tables[which].shape[1])[name]
    return list(tables.values())


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
def test_attention(which: str, window: int | None, kind: str, isa: str) -> None:
    bound = {"f32": 1e-5, "bf16": 2e-3, "q8_0": 1e-2}[kind]
    for name in FINITE:
        if kind == "q8_0" and name in TOO_LARGE:
            continue
        ours, theirs = both(isa, sequence(which, name), attended(window, kind), pages=(1, 0))
        assert_agree(ours, theirs, [f"{name} {row}" for row in range(POSITIONS)], bound)


@pytest.mark.parametrize("isa", HERE)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
def test_attention_hides_no_infinity(which: str, kind: str, isa: str) -> None:
    """Every row that sees it has it in some number; rows of other tiles do not."""
    window, names = 24, ["nan"]
    if which != "keys":  # a score of -inf is a weight of zero
        names += ["inf", "-inf"]
    if kind == "q8_0" and which != "queries":
        names += TOO_LARGE
    for name in names:
        ours, _ = both(isa, sequence(which, name), attended(window, kind), pages=(1, 0))
        finite = np.isfinite(ours).all(-1)
        seen = range(EXTREME, EXTREME + (1 if which == "queries" else window))
        assert not finite[seen].any(), name
        assert finite[seen.stop + 64 :].all(), name


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_packing_sees_a_weight_that_is_no_number(name: str, bad: float) -> None:
    scheme, rows, width = SCHEMES[name], 35, 512  # three groups of rows, the last one not whole
    good = random_weight(name, rows, width, seed=3)
    ops, reference = CPUOps(threads=2), ReferenceOps()
    assert ops.is_finite(ops.pack(good)) and reference.is_finite(reference.pack(good))
    size = 4 if name == "f32" else 2
    bits = np.array([bad], np.float32)
    stored = bits.view(np.uint8)[2:] if name == "bf16" else bits.astype(f"f{size}").view(np.uint8)
    _, places = BLOCKS.get(name, (0, (0,)))
    for place in places:
        for row, block in ((0, 0), (17, 1), (rows - 1, width // scheme.block - 1)):
            data = good.data.copy()
            at = block * scheme.block_bytes + place
            data[row, at : at + size] = stored
            wrong = QTensor(scheme, (rows, width), data)
            assert not ops.is_finite(ops.pack(wrong))
            assert not reference.is_finite(reference.pack(wrong))
