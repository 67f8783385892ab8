"""The ledger against what is there: stored bytes, packed weights, cells, published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import PUBLISHED

from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.families import spec_of
from halfbyte.families.gemma4_assistant import drafter_for
from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import demo_path
from halfbyte.kernels.contract import KVLayout
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.models.load import load
from halfbyte.planner.cards import card
from halfbyte.planner.cost import cache, ledger, weights
from halfbyte.planner.runtimes import Companion, runtime_of
from halfbyte.planner.solve import Goal, Model, schemes_of, solve
from halfbyte.specs import KVType, Machine, ModelSpec, Setup, plan_of

native = pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
MACHINE = Machine(name="a machine", kind="cpu", memory_bytes=64 * 2**30)
SETUP = Setup(recipe=None, kv="bf16", context=4096)


def spec(name: str) -> ModelSpec:
    return spec_of(PUBLISHED[name][0])


def demo() -> Model:
    source = read(demo_path())
    return Model(name="demo", spec=source.spec, schemes=source.schemes, quantized=True)


@native
@pytest.mark.parametrize("model_path", ["demo", "tiny_gemma4", "stories260k"])
def test_weights_are_what_is_stored_and_what_is_packed(
    model_path: str, request: pytest.FixtureRequest
) -> None:
    path = demo_path() if model_path == "demo" else request.getfixturevalue(model_path)
    source = read(path)
    runtime = runtime_of("cpu", source.spec, source.schemes)
    rows = list(weights(source.spec, source.schemes, runtime))
    ops = CPUOps(threads=1)
    load(source, ops)
    stored = sum(tensor.nbytes for _, tensor in source.tensors())
    assert sum(row.bytes for row in rows if row.component != "weights.layout") == stored
    assert sum(row.bytes for row in rows) == ops.packed_bytes


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("recipe", ["bf16", "q8_0", "q4_0"])
def test_weights_of_published_models_sum_to_their_tensors(name: str, recipe: str) -> None:
    model = spec(name)
    schemes = schemes_of(model, recipe)
    runtime = runtime_of("cpu", model, schemes)
    rows = [row for row in weights(model, schemes, runtime) if row.component != "weights.layout"]
    assert sum(row.bytes for row in rows) == sum(
        schemes[tensor.name].bytes(tensor.shape) for tensor in model.tensors()
    )


@native
@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0"])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
def test_cells_take_what_is_planned(kind: KVType, head_dim: int) -> None:
    layout = KVLayout(
        num_cells=256, stride=64, sliding=False, kv_heads=3, head_dim=head_dim, kind=kind
    )
    ops = CPUOps(threads=1)
    assert ops.new_kv(layout).nbytes == ops.kv_bytes(layout)


# facts: bytes per token of the full layers, and of the sliding ones up to their window, in bf16
@pytest.mark.parametrize(
    ("name", "sliding", "full", "window"),
    [
        ("gemma4-e2b", 12_288, 6_144, 512),
        ("gemma4-e4b", 40_960, 16_384, 512),
        ("gemma4-12b", 327_680, 16_384, 1024),
        ("gemma4-26b-a4b", 204_800, 20_480, 1024),
        ("gemma4-31b", 819_200, 81_920, 1024),
        ("gemma3-12b", 327_680, 65_536, 1024),
        ("gemma3-27b", 425_984, 81_920, 1024),
        ("gemma3-4b", 118_784, 20_480, 1024),
        ("gemma3-1b", 22_528, 4_096, 512),
    ],
)
def test_caches_take_what_is_published(name: str, sliding: int, full: int, window: int) -> None:
    model = spec(name)
    runtime = runtime_of("cuda", model, schemes_of(model, "bf16"), reference=True)
    rows = {
        row.component: row.bytes for row in cache(model, replace(SETUP, context=32768), runtime)
    }
    assert rows["kv.sliding"] == sliding * window
    assert rows["kv.full"] in (full * 32768, full * 32768 // 2)  # half where only values are kept


@settings(deadline=None, max_examples=40)
@given(
    low=st.integers(64, 4096),
    more=st.integers(0, 4096),
    kv=st.sampled_from(["bf16", "q8_0", "f32"]),
)
def test_more_context_never_costs_less(low: int, more: int, kv: KVType) -> None:
    model = demo()
    runtime = runtime_of("cpu", model.spec, model.schemes)

    def total(context: int) -> int:
        setup = replace(SETUP, context=context, kv=kv)
        return sum(row.bytes for row in ledger(model.spec, model.schemes, setup, runtime))

    assert total(low) <= total(low + more)


BUDGETS = [n * 2**30 // 4 for n in range(2, 24)]


def companion(target: ModelSpec) -> Companion:
    reads = [len(target.layers) - 2, len(target.layers) - 1]
    its = drafter_for(target, reads=reads, hidden=512, width=2048)
    return Companion(name="its drafter", spec=its, schemes=schemes_of(its, "q8_0"))


@pytest.mark.parametrize("drafted", [False, True])
def test_a_larger_budget_never_yields_a_worse_plan_and_every_plan_fits_its_budget(
    drafted: bool,
) -> None:
    its = spec("llama-3.2-1b")
    drafter = companion(its) if drafted else None
    model = Model(name="x", spec=its, schemes={}, quantized=False, drafter=drafter)
    # Drafting is given up before a smaller cache, and that before a recipe of fewer bits.
    order = [
        (recipe, kv, on)
        for recipe in ("bf16", "q8_0", "q4_0", "q4_0-pure")
        for kv in ("bf16", "q8_0")
        for on in (True, False)
    ]
    best = (False, 0, 0)
    for budget in BUDGETS:
        try:
            plan, _ = solve(model, MACHINE, Goal(budget_bytes=budget))
        except DoesNotFitError:
            assert best == (False, 0, 0)
            continue
        assert plan.fits
        assert plan.total_bytes == sum(row.bytes for row in plan.rows)
        setup = plan.setup
        assert (setup.drafter is not None) is (drafted and setup.draft > 0)
        reaches = setup.context >= 8192
        way = (setup.recipe or "", setup.kv, setup.draft > 0 or not drafted)
        this = (reaches, -order.index(way) if reaches else 0, setup.context)
        assert this >= best
        best = this
    assert best[1] == 0  # with memory enough: the most faithful way, with its drafter


@pytest.mark.parametrize(
    ("name", "recipe", "gigabytes", "context", "fits"),
    [
        ("gemma3-27b", "q4_0", 24, 8192, True),
        ("gemma3-12b", "q4_0", 8, 2048, True),
        ("gemma4-12b", "q4_0", 12, 32768, True),
        ("qwen3-8b", "bf16", 16, 8192, False),
        ("qwen3-8b", "q8_0", 16, 8192, True),
        ("qwen3-8b", "q4_0", 16, 8192, True),
    ],
)
@native
def test_what_fits(name: str, recipe: str, gigabytes: int, context: int, fits: bool) -> None:
    model = Model(name=name, spec=spec(name), schemes={}, quantized=False)
    goal = Goal(budget_bytes=gigabytes * 2**30, context=context, recipe=recipe)
    if fits:
        assert solve(model, MACHINE, goal)[0].fits
    else:
        with pytest.raises(DoesNotFitError, match="do not fit into") as caught:
            solve(model, MACHINE, goal)
        assert "would hold it" in (caught.value.hint or "")


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="beyond the model's 4096"):
        solve(demo(), MACHINE, Goal(context=4097))


def test_a_plan_is_read_back_as_it_was_written() -> None:
    plan, _ = solve(demo(), replace(MACHINE, bandwidth=3e10), Goal(budget_bytes=2**30))
    assert plan_of(plan.document()) == plan
    with pytest.raises(InvalidInputError, match="no plan"):
        plan_of({})
    with pytest.raises(InvalidInputError, match="not a plan"):
        plan_of({**plan.document(), "setup": {"context": 1}})


def test_cards_are_found_by_the_names_people_use() -> None:
    assert card("RTX 3060").memory_bytes == 12 * 2**30
    assert card("4070 Ti Super").name == "rtx-4070-ti-super"
    with pytest.raises(InvalidInputError, match="no card") as caught:
        card("3060x")
    assert "rtx-3060" in (caught.value.hint or "")
    with pytest.raises(InvalidInputError):
        card("")


def test_twelve_billion_weights_and_32768_positions_fit_a_card_of_12_gb() -> None:
    """By the very program that would run on it."""
    model = Model(name="12b", spec=spec("gemma4-12b"), schemes={}, quantized=False)
    plan = solve(model, card("rtx-3060"), Goal(context=32768, recipe="q4_0", kv="bf16"))[0]
    assert plan.fits and plan.ops.startswith("Triton")
    assert plan.own_bytes <= 9.0e9
    # Steps that are larger, and longer contexts, take no less.
    steps = [
        solve(model, card("h200"), Goal(context=context, recipe="q4_0", sequences=count))[0]
        for context, count in ((8192, 1), (32768, 1), (32768, 4))
    ]
    sizes = [it.part("activations.") for it in steps]
    assert sizes == sorted(sizes) and sizes[0] > 2**20
