"""Plans of a model too large for a card: what lies where, how fast it is, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import Halfbyte
from interpreter import DEVICE
from published import PUBLISHED
from random_drafters import random_drafter

from halfbyte import LLM
from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.families import spec_of
from halfbyte.families.gemma4_assistant import drafter_for
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.kernels import choice
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.kernels.relay import Front
from halfbyte.kernels.triton import TritonOps
from halfbyte.kernels.triton.device import Device
from halfbyte.models.load import load
from halfbyte.planner.cards import card
from halfbyte.planner.opening import usual_plan
from halfbyte.planner.runtimes import Companion
from halfbyte.planner.solve import MARGIN, Goal, Model, schemes_of, solve
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import LoadOptions, Machine, Plan, Row, cuts, plan_of, recipe_of

native = pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
MIB, GIB = 2**20, 2**30
HOST = Machine(name="a host", kind="cpu", memory_bytes=64 * GIB, bandwidth=50e9)
CARD = replace(card("rtx-3060"), host=HOST)
GOAL = Goal(context=8192, draft=0, kv="bf16")


def model(name: str, recipe: str = "q4_0") -> Model:
    spec = spec_of(PUBLISHED[name][0])
    return Model(name=name, spec=spec, schemes=schemes_of(spec, recipe), quantized=True)


def stored(rows: tuple[Row, ...], place: str) -> int:
    return sum(
        row.bytes
        for row in rows
        if row.place == place
        and row.component.startswith("weights.")
        and row.component != "weights.layout"
    )


def test_what_a_card_has_no_room_for_lies_on_its_host() -> None:
    its = model("gemma4-31b")
    plan, others = solve(its, CARD, GOAL)
    layers = plan.setup.card_layers
    assert layers is not None and plan.fits and 0 < plan.host_bytes < plan.host_budget_bytes
    assert not others[0].fits and others[-1] == plan
    more = solve(its, replace(CARD, memory_bytes=64 * GIB), replace(GOAL, card_layers=layers + 1))
    assert more[0].total_bytes > plan.budget_bytes  # not one layer more
    table = its.schemes["embed.weight"].bytes((its.spec.vocab, its.spec.hidden))
    both = stored(plan.rows, "device") + stored(plan.rows, "host")
    assert both == stored(others[0].rows, "device") + table
    for component in ("kv.full", "kv.sliding"):
        assert plan.part(component) == others[0].part(component)
    assert {row.component for row in plan.rows if row.place == "host"} >= {
        "weights.embedding.q6_k",
        "kv.sliding",
        "activations.step",
        "runtime.process",
    }
    assert plan_of(json.loads(json.dumps(plan.document()))) == plan


def test_a_divided_model_is_as_fast_as_its_two_parts_in_turn() -> None:
    its = model("gemma4-31b")
    roomy = replace(CARD, memory_bytes=64 * GIB)
    whole = rate(solve(its, roomy, GOAL)[0])
    on_host = rate(solve(its, HOST, GOAL)[0])
    rates = [rate(solve(its, roomy, replace(GOAL, card_layers=n))[0]) for n in (10, 30, 59)]
    assert on_host < rates[0] < rates[1] < rates[2] < whole
    unknown = replace(roomy, host=replace(HOST, bandwidth=None))
    assert solve(its, unknown, replace(GOAL, card_layers=30))[0].tokens_per_s is None


def rate(plan: Plan) -> float:
    assert plan.tokens_per_s is not None
    return plan.tokens_per_s[0]


def test_whatever_fits_whole_is_not_divided() -> None:
    its = model("gemma4-12b")
    assert solve(its, CARD, GOAL)[0].setup.card_layers is None
    few = Machine(name="x", kind="cuda", memory_bytes=8 * GIB, host=HOST)
    usual = usual_plan(its, few, Goal(draft=0))
    assert usual.setup.card_layers is None
    # Nobody asked for a context: a shorter one comes before layers on the CPU.
    shorter = replace(few, memory_bytes=int(7.6 * GIB))
    assert usual_plan(its, shorter, Goal(draft=0)).setup.card_layers is None
    asked = usual_plan(its, shorter, Goal(draft=0, context=32768))
    assert asked.setup.card_layers is not None and asked.setup.context == 32768


def test_what_is_not_quantized_is_divided_in_four_bits() -> None:
    its = replace(model("gemma4-31b", "bf16"), quantized=False)
    plan = solve(its, CARD, GOAL)[0]
    assert plan.setup.recipe == "q4_0" and plan.setup.card_layers is not None


def test_layers_that_share_a_cache_stay_together() -> None:
    its = model("gemma4-e4b")
    small = replace(CARD, memory_bytes=3 * GIB)
    plan = solve(its, small, replace(GOAL, context=1024))[0]
    assert plan.setup.card_layers in cuts(its.spec)
    # The tables of embeddings per layer are most of a small model, and never on the card.
    assert not any(row.place == "device" and "per_layer.q6_k" in row.component for row in plan.rows)


def test_what_cannot_be_is_refused_with_the_reason() -> None:
    its = model("gemma4-e4b")
    with pytest.raises(InvalidInputError, match="would read the cache of layer"):
        solve(its, CARD, replace(GOAL, card_layers=3))
    with pytest.raises(InvalidInputError, match="43 layers on the card; the model has 42"):
        solve(its, CARD, replace(GOAL, card_layers=43))
    for machine in (HOST, replace(CARD, host=None)):
        with pytest.raises(InvalidInputError, match="--card-layers is for a card"):
            solve(its, machine, replace(GOAL, card_layers=30))
    apart = solve(its, CARD, replace(GOAL, card_layers=42))[0]
    assert apart.setup.card_layers == 42 and "the embeddings of" in apart.ops
    tied = model("gemma4-12b")
    assert solve(tied, CARD, replace(GOAL, card_layers=48))[0].setup.card_layers is None
    large = model("gemma4-31b")
    for machine in (replace(CARD, host=None), replace(CARD, host=replace(HOST, memory_bytes=GIB))):
        with pytest.raises(DoesNotFitError):
            solve(large, machine, GOAL)
    with pytest.raises(DoesNotFitError) as refused:
        solve(large, CARD, replace(GOAL, card_layers=59))
    assert refused.value.hint is not None and "fewer --card-layers" in refused.value.hint


def test_a_drafter_is_planned_where_the_layers_it_reads_lie() -> None:
    its = model("gemma4-31b")
    reads = [len(its.spec.layers) - 2, len(its.spec.layers) - 1]
    small = drafter_for(its.spec, reads=reads, hidden=512, width=2048)
    drafter = Companion(name="its drafter", spec=small, schemes=schemes_of(small, "q8_0"))
    goal = replace(GOAL, draft=3)
    with_it = solve(replace(its, drafter=drafter), CARD, goal)[0]
    assert with_it.setup.drafter == "its drafter" and with_it.part("drafter.") > 0
    assert all(row.place == "device" for row in with_it.rows if row.component.startswith("drafter"))
    apart = solve(replace(its, drafter=drafter), CARD, replace(goal, card_layers=1))[0]
    assert apart.setup.drafter is None and apart.part("drafter.") == 0


@native
@pytest.mark.parametrize("card_layers", [1, 3])
def test_parts_take_what_is_planned(card_layers: int, tiny_gemma4: Path) -> None:
    source = Quantized(read(tiny_gemma4), recipe_of("q4_0"))
    its = Model(name="x", spec=source.spec, schemes=source.schemes, quantized=True)
    goal = Goal(context=256, draft=0, card_layers=card_layers, kv="bf16")
    plan = solve(its, CARD, goal)[0]
    front = Front(CPUOps(threads=1), card_layers)
    decoder = load(source, TritonOps(Device(DEVICE)), front=front)
    assert decoder.front is not None
    for place, ops in (("device", decoder.ops), ("host", decoder.front.ops)):
        rows = [row for row in plan.rows if row.place == place]
        assert sum(row.bytes for row in rows if row.component.startswith("weights.")) == (
            ops.packed_bytes
        )
    assert plan.ops.partition(" behind ")[2] == decoder.name.partition(" behind ")[2]


def test_the_command_says_what_lies_where(halfbyte: Halfbyte, tmp_path: Path) -> None:
    config = PUBLISHED["gemma4-12b"][0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = halfbyte(
        "plan", tmp_path, "--machine", "rtx-3060", "--recipe", "q4_0", "--context", "1k",
        "--draft", "off", "--card-layers", "40", "--json",
    ).document  # fmt: skip
    assert told["setup"]["card_layers"] == 40
    places = {row["place"] for row in told["rows"]}
    assert places == {"device", "host"} and told["host_bytes"] > 0
    refused = halfbyte("plan", tmp_path, "--card-layers", "40", "--device", "cpu")
    assert refused.code == 2 and "--card-layers is for a card" in refused.err


@pytest.fixture
def small_card(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The interpreter in place of a card."""
    if DEVICE != "cpu":
        pytest.skip("there is a card: tests/test_kernels_cuda.py has this on it")
    machine = replace(CARD, memory_bytes=2 * GIB)
    monkeypatch.setattr(choice, "_lacks_cuda", lambda: None)
    monkeypatch.setattr(choice, "_lacks_triton", lambda _="cuda": None)
    monkeypatch.setattr(choice, "_triton", lambda *_: TritonOps(Device(DEVICE)))
    monkeypatch.setattr("halfbyte.llm.this_machine", lambda _: machine)
    return machine


@native
def test_a_model_is_loaded_and_answers_on_both(small_card: Machine, tiny_gemma4: Path) -> None:
    options = LoadOptions(recipe="q4_0", context=64, draft="off", device="cuda", card_layers=1)
    llm = LLM(str(tiny_gemma4), options)
    assert llm.plan.setup.card_layers == 1 and llm.decoder.front is not None
    assert "behind" in llm.decoder.name and not llm.notes
    greedy = llm.sampling(temperature=0)
    here = LLM(str(tiny_gemma4), replace(options, device="cpu", card_layers=None))
    said = [it.generate(["The sea"], sampling=greedy, max_tokens=2) for it in (llm, here)]
    assert said[0] == said[1]
    assert llm.memory.weights_bytes == llm.decoder.packed_bytes > llm.decoder.ops.packed_bytes


@native
def test_a_card_that_is_too_small_is_told_of(
    small_card: Machine, tiny_gemma4: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = LoadOptions(recipe="q4_0", context=64, draft="off", device="cuda")
    whole = LLM(str(tiny_gemma4), options).plan
    assert whole.setup.card_layers is None
    own = whole.total_bytes - whole.part("runtime.margin")
    tight = replace(small_card, memory_bytes=int((own - MIB) / (1 - MARGIN)))
    monkeypatch.setattr("halfbyte.llm.this_machine", lambda _: tight)
    llm = LLM(str(tiny_gemma4), options)
    layers = llm.plan.setup.card_layers
    assert layers is not None and f"{layers} of {len(llm.spec.layers)} layers" in llm.notes[0]
    # A long context fits whole once its cache is smaller.
    monkeypatch.setattr("halfbyte.llm.this_machine", lambda _: small_card)
    long = replace(options, context=4096, parallel=4)
    wide = LLM(str(tiny_gemma4), long).plan
    own = wide.total_bytes - wide.part("runtime.margin") - wide.part("kv.full") // 8
    room = replace(small_card, memory_bytes=int(own / (1 - MARGIN)))
    monkeypatch.setattr("halfbyte.llm.this_machine", lambda _: room)
    assert "with --kv q8_0 it has room for all" in LLM(str(tiny_gemma4), long).notes[0]
    given = replace(llm.plan, setup=replace(llm.plan.setup, recipe="q4_0"))
    again = LLM(str(tiny_gemma4), LoadOptions(device="cuda"), plan=given)
    assert again.plan.setup == llm.plan.setup and again.decoder.front is not None


@native
def test_a_drafter_by_name_that_cannot_work_is_refused(
    small_card: Machine, tiny_gemma4: Path, tmp_path: Path
) -> None:
    target = read(tiny_gemma4).spec
    write_gguf(random_drafter(target, recipe="q8_0"), tmp_path / "it.gguf")
    options = LoadOptions(
        recipe="q4_0", context=64, device="cuda", card_layers=1, drafter=str(tmp_path / "it.gguf")
    )
    with pytest.raises(InvalidInputError, match="which lies on the CPU"):
        LLM(str(tiny_gemma4), options)
