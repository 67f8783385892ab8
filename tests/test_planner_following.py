"""Plans with drafters, adapters and what is left out; plans that are followed, edited, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
from adapter_files import tensors_of, write_adapter
from commandline import Halfbyte
from published import PUBLISHED
from random_drafters import random_drafter

from halfbyte.errors import DoesNotFitError, InvalidInputError
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.lora import open_adapter
from halfbyte.formats.reference import demo_path
from halfbyte.kernels.cpu import CPUOps, instruction_set
from halfbyte.models.load import load, load_drafter
from halfbyte.planner.opening import model_of
from halfbyte.planner.solve import Goal, solve
from halfbyte.specs import Machine, plan_of

native = pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
MACHINE = Machine(name="a machine", kind="cpu", memory_bytes=8 * 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in a folder of its own, with a drafter beside it that has a shortlist."""
    folder = tmp_path_factory.mktemp("model")
    copyfile(demo_path(), folder / "model.gguf")
    target = read(demo_path()).spec
    write_gguf(random_drafter(target, recipe="q8_0", head_rows=2048), folder / "model.drafter.gguf")
    return folder / "model.gguf"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = read(demo_path()).spec
    shapes = {
        f"model.layers.{index}.{module}": shape
        for index, layer in enumerate(spec.layers)
        for module, shape in (
            ("self_attn.q_proj", (layer.attention.query_width, spec.hidden)),
            ("mlp.down_proj", (spec.hidden, layer.mlp.width)),
        )
    }
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors_of(shapes))


@native
def test_a_drafter_beside_the_model_is_counted(model: Path) -> None:
    found = model_of(str(model))
    assert found.drafter is not None
    plan, others = solve(found, MACHINE, Goal())
    assert plan.setup.drafter == str(model.with_name("model.drafter.gguf"))
    assert plan.setup.draft == 7
    assert {other.setup.draft for other in others} == {0, 7}
    ops = CPUOps(threads=1)
    target = load(read(model), ops)
    before = ops.packed_bytes
    load_drafter(read(model.with_name("model.drafter.gguf")), target)
    kept = ops.packed_bytes - before
    assert plan.part("drafter.weights") + plan.part("drafter.layout") == kept
    assert plan.part("drafter.step") > 8 * 2048 + 4 * target.spec.vocab
    off, _ = solve(found, MACHINE, Goal(draft=0))
    assert off.setup.drafter is None and off.part("drafter.") == 0
    assert off.total_bytes < plan.total_bytes


@native
def test_a_drafter_that_does_not_fit_is_left_aside(model: Path) -> None:
    found = model_of(str(model))
    whole, _ = solve(found, MACHINE, Goal())
    least = whole.total_bytes - whole.part("runtime.margin") - whole.part("drafter.") // 2
    plan, _ = solve(found, MACHINE, Goal(budget_bytes=int(least / 0.98) + 1))
    assert plan.fits
    assert plan.setup.context == whole.setup.context
    assert plan.setup.drafter is None


@native
def test_adapters_are_counted(adapter: Path) -> None:
    found = model_of("demo", adapters=[str(adapter)])
    plan, _ = solve(found, MACHINE, Goal())
    plain, _ = solve(model_of("demo"), MACHINE, Goal())
    assert plan.setup.adapters == (str(adapter),)
    spec = read(demo_path()).spec
    ops = CPUOps(threads=1)
    loaded = load(read(demo_path()), ops, adapters={"a": open_adapter(str(adapter), spec)})
    assert plan.part("adapters.") == loaded.adapter_bytes
    assert (
        plan.part("weights.") == plain.part("weights.") == ops.packed_bytes - loaded.adapter_bytes
    )


def test_a_drafter_of_another_model_is_refused_if_it_was_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama-3.2-1b"][0]))
    drafter = str(model.with_name("model.drafter.gguf"))
    with pytest.raises(InvalidInputError, match="another target"):
        model_of(str(tmp_path), drafter=drafter)
    copyfile(drafter, tmp_path / "drafter.gguf")
    assert model_of(str(tmp_path)).drafter is None


def test_parts_for_other_senses_are_told_and_not_counted(tiny_gemma4: Path) -> None:
    found = model_of(str(tiny_gemma4))
    source = read(tiny_gemma4)
    assert set(found.left_out) == {"vision.weights", "audio.weights"}
    plan, _ = solve(found, MACHINE, Goal())
    assert {row.component: row.bytes for row in plan.left_out} == found.left_out
    assert 0 < sum(found.left_out.values()) <= sum(source.unused_bytes.values())
    assert plan.total_bytes == sum(row.bytes for row in plan.rows)
    assert plan_of(plan.document()) == plan


def test_as_many_sequences_as_fit() -> None:
    goal = Goal(context=1024, kv="bf16", sequences=None, budget_bytes=64 * 2**20)
    plan, _ = solve(model_of("demo"), MACHINE, goal)
    assert 256 > plan.setup.sequences > 1 and plan.fits
    with pytest.raises(DoesNotFitError):
        solve(model_of("demo"), MACHINE, replace(goal, sequences=plan.setup.sequences + 1))


def emitted(halfbyte: Halfbyte, folder: Path, model: object, *flags: object) -> dict[str, Any]:
    outcome = halfbyte("plan", model, *flags, "--emit", folder / "plan.json")
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "plan.json").read_text())


RUN = ("--raw", "--max-tokens", 12, "--temperature", 0, "--json")


@native
def test_a_plan_is_followed(halfbyte: Halfbyte, tmp_path: Path, model: Path, adapter: Path) -> None:
    file = tmp_path / "plan.json"
    document = emitted(halfbyte, tmp_path, model, "--context", 512, "--kv", "q8_0",
                       "--lora", adapter)  # fmt: skip
    told = halfbyte("run", model, "My dear", *RUN, "--plan", file)
    assert told.code == 0, told.err
    same = halfbyte("run", model, "My dear", *RUN, "--context", 512, "--kv", "q8_0",
                    "--lora", adapter)  # fmt: skip
    assert told.document["token_ids"] == same.document["token_ids"]
    memory = told.document["stats"]["memory"]
    plan = plan_of(document)
    assert memory["planned_bytes"] == plan.own_bytes
    assert memory["drafter_bytes"] == plan.part("drafter.weights") + plan.part("drafter.layout")
    assert memory["adapters_bytes"] == plan.part("adapters.")
    kept = plan.part("kv.full") + plan.part("kv.sliding") + plan.part("kv.slack")
    assert memory["kv_bytes"] == kept


@native
def test_a_plan_edited_by_hand_is_followed(halfbyte: Halfbyte, tmp_path: Path, model: Path) -> None:
    document = emitted(halfbyte, tmp_path, model)
    document["setup"] |= {"context": 256, "sequences": 2, "draft": 0, "drafter": None}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    told = halfbyte("run", model, "My dear", *RUN, "--plan", tmp_path / "plan.json")
    assert told.code == 0, told.err
    assert told.document["stats"]["memory"]["drafter_bytes"] == 0
    assert told.document["stats"]["draft"] is None


@pytest.mark.parametrize(
    ("edit", "code", "said"),
    [
        ({"setup": {"context": 4097}}, 2, "beyond the model's 4096"),
        ({"setup": {"kv": "q3"}}, 2, "kv is 'q3'"),
        ({"setup": {"context": -5}}, 2, "context is -5"),
        ({"setup": {"context": "8k"}}, 2, "context is '8k'"),
        ({"setup": {"recipe": "q9"}}, 2, "unknown recipe 'q9'"),
        ({"setup": {"knob": 1}}, 2, "knob"),
        ({"setup": {"drafter": "/no/such.gguf"}}, 2, "no existing path"),
        ({"setup": {"adapters": ["/no/such"]}}, 2, "no adapter"),
        ({"budget_bytes": 2**23}, 3, "do not fit into"),
        ({"budget_bytes": -1}, 2, "budget_bytes is -1"),
        ({"schema": "halfbyte.run/1"}, 2, "no plan"),
        ({"rows": "none"}, 2, "not a plan"),
    ],
)
def test_contradictions_are_refused_by_name(
    halfbyte: Halfbyte, tmp_path: Path, edit: dict[str, Any], code: int, said: str
) -> None:
    document = emitted(halfbyte, tmp_path, "demo")
    for key, value in edit.items():
        document[key] = {**document[key], **value} if isinstance(value, dict) else value
    (tmp_path / "plan.json").write_text(json.dumps(document))
    told = halfbyte("run", "demo", "My dear", *RUN, "--plan", tmp_path / "plan.json")
    assert (told.code, told.out) == (code, ""), told.err
    assert said in told.err


def test_a_plan_of_another_model_is_refused_by_row(halfbyte: Halfbyte, tmp_path: Path) -> None:
    document = emitted(halfbyte, tmp_path, "demo")
    row = next(row for row in document["rows"] if row["component"].startswith("weights.mlp"))
    row["bytes"] -= 18
    (tmp_path / "plan.json").write_text(json.dumps(document))
    told = halfbyte("run", "demo", "My dear", *RUN, "--plan", tmp_path / "plan.json")
    assert told.code == 2
    assert row["component"] in told.err and "plan this one anew" in told.err


@pytest.mark.parametrize("flags", [("--context", 64), ("--kv", "q8_0"), ("--draft", "off")])
def test_a_flag_beside_a_plan_is_refused(
    halfbyte: Halfbyte, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    emitted(halfbyte, tmp_path, "demo")
    for verb in ("run", "fill"):
        told = halfbyte(verb, "demo", *flags, "--plan", tmp_path / "plan.json")
        assert told.code == 2
        assert str(flags[0]) in told.err and "plan.json" in told.err


def test_no_plan_at_all(halfbyte: Halfbyte, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    assert halfbyte("fill", "demo", "--plan", tmp_path / "plan.json").code == 2
    (tmp_path / "plan.json").write_text("[]")
    assert halfbyte("fill", "demo", "--plan", tmp_path / "plan.json").code == 2
