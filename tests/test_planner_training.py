"""Plans for training: the rules of thumb as special cases, published tables, laws, autograd."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Halfbyte
from hypothesis import given, settings
from hypothesis import strategies as st
from published import CONFIGS, PUBLISHED

from halfbyte.errors import InvalidInputError
from halfbyte.families import spec_of
from halfbyte.numerics.grids import GRIDS
from halfbyte.planner.cards import card
from halfbyte.planner.engines import accelerate, deepspeed, written
from halfbyte.planner.grid_training import GROUPS, largest, on_grid
from halfbyte.planner.solve import Model, schemes_of
from halfbyte.planner.training import (
    MODES,
    Constants,
    Mode,
    Training,
    block_weights,
    kept,
    states,
    trained,
)
from halfbyte.planner.ways import costs_of, other_ways, plan_training, rules_of_thumb
from halfbyte.specs import SCHEMES, ModelSpec

GB = 10**9
BILLION = 10**9


def spec(name: str) -> ModelSpec:
    return spec_of(PUBLISHED[name][0])


def sizes(model: ModelSpec, training: Training) -> dict[str, int]:
    """Component -> bytes, weights that are frozen put together."""
    found: dict[str, int] = {}
    for cost in costs_of(model, schemes_of(model, training.recipe), training):
        name = "weights.frozen" if cost.component.startswith("weights.frozen") else cost.component
        found[name] = found.get(name, 0) + cost.bytes
    return found


def test_rules_of_thumb_are_special_cases() -> None:
    rules = {rule.name.split(":")[0]: rule for rule in rules_of_thumb(8 * BILLION)}
    told = {name: rule.bytes / GB for name, rule in rules.items()}
    assert told["loaded in fp16"] == 16
    assert told["loaded in int8"] == 8
    assert told["loaded in int4"] == 4
    assert told["AdamW in fp32"] == 128 == 4 * 4 * 8  # four times the parameters in fp32
    assert told["AdamW, mixed"] == 128
    assert told["between steps"] == 112
    assert told["between steps"] / told["loaded in fp16"] == 7
    assert told["with 8-bit states"] / told["loaded in fp16"] == pytest.approx(5, abs=0.02)
    assert "activations" in rules["AdamW in fp32"].leaves_out
    assert "gradients" in rules["between steps"].leaves_out


def test_what_is_stored_differs_from_the_rules_by_what_they_leave_out() -> None:
    """8 B in q4_0: 4 GB by the rule; a scale for every 32 weights and a q6_k table are more."""
    model = spec("qwen3-8b")
    schemes = schemes_of(model, "q4_0")
    stored = sum(schemes[t.name].bytes(t.shape) for t in model.tensors())
    rule = model.parameters / 2
    body = sum(t.count for t in model.tensors() if schemes[t.name].name == "q4_0")
    tables = sum(t.count for t in model.tensors() if schemes[t.name].name == "q6_k")
    left_out = body * 2 / 32 + tables * (210 / 256 - 1 / 2)
    assert stored - rule == pytest.approx(left_out, rel=2e-3)


# algorithms.md 2.2: a 12 B of 11.77 B parameters, layers of 224.1 M
def test_a_12b_takes_what_its_published_arithmetic_says() -> None:
    model = spec("gemma3-12b")
    full = sizes(model, Training(mode="full"))
    whole = sum(full[name] for name in ("weights.trained", "gradients", "master", "optimizer"))
    assert whole / GB == pytest.approx(188, rel=0.005)
    block = sizes(model, Training(mode="blockwise", batch=2, precision="fp32", tokens=2**20))
    assert block_weights(model) == pytest.approx(224.1e6, rel=1e-3)
    scales = block_weights(model) / 32
    for name, size in (
        ("weights.trained", 0.90),
        ("gradients", 0.90),
        ("optimizer", 1.79),
    ):
        assert block[name] / GB == pytest.approx(size, abs=0.006 + 8 * scales / GB)
    assert block["activations.moment"] / GB < 2 * (0.45 + 1.5)  # in f32: rounded weights, and rows
    assert block["data.blocks"] / 2 / GB == pytest.approx(2 * 8.05, rel=0.001)  # in f32
    ends = sizes(
        model,
        Training(mode="scales", optimizer="adamw-8bit", tokens=2**20),
    )
    steps = largest(model, schemes_of(model, "q4_0"), Training(mode="scales")).others
    assert steps == pytest.approx(336e6, rel=0.003)  # and vectors
    assert ends["weights.frozen"] / GB == pytest.approx(6.05, rel=0.005)
    for name, size in (("weights.trained", 4), ("gradients", 4), ("optimizer", 2)):
        assert ends[name] / GB == pytest.approx(size * 0.336, rel=0.03)
    assert ends["activations.checkpoints"] / GB == pytest.approx(2 * 0.75, rel=0.01)  # in f32
    assert ends["data.teacher"] / GB == pytest.approx(2 * 8.05, rel=0.001)
    assert trained(model, Training(mode="qlora", rank=16)) == pytest.approx(65.5e6, rel=0.001)


def test_a_block_takes_the_same_at_any_depth() -> None:
    model = spec("gemma4-12b")
    depths = [replace(model, layers=model.layers[-count:]) for count in (6, 12)]
    first, second = (
        sizes(cut, Training(mode="blockwise", tokens=4096, precision="fp32")) for cut in depths
    )
    assert first == second


@settings(deadline=None, max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    batch=st.integers(1, 4),
    length=st.integers(64, 4096),
    precision=st.sampled_from(["fp32", "mixed", "bf16"]),
)
def test_more_never_costs_less(mode: Mode, batch: int, length: int, precision: Any) -> None:
    model = spec("llama-3.2-1b")
    training = Training(mode=mode, batch=batch, length=length, precision=precision)

    def total(changed: Training) -> int:
        return sum(sizes(model, changed).values())

    assert total(training) <= total(replace(training, batch=batch + 1))
    assert total(training) <= total(replace(training, length=length + 1))
    assert total(training) <= total(replace(training, checkpointing=False))
    assert total(replace(training, loss_rows=64)) <= total(training)
    assert total(replace(training, optimizer="adamw-8bit")) <= total(training)


@settings(deadline=None, max_examples=40)
@given(
    gpus=st.integers(1, 16),
    zero=st.integers(0, 2),
    precision=st.sampled_from(["fp32", "mixed"]),
)
def test_zero_only_divides(gpus: int, zero: int, precision: Any) -> None:
    """What GPUs hold together is never less than one holds alone; a stage more never costs more."""

    def held(stage: int) -> int:
        training = Training(mode="full", gpus=gpus, zero=stage, precision=precision)
        found = {cost.component: cost.bytes for cost in states(10**9, training)}
        return sum(size for name, size in found.items() if name != "gradients.step")

    assert held(zero + 1) <= held(zero)
    assert held(zero) * gpus >= held(0)


def test_offload_moves_and_loses_nothing() -> None:
    here = {c.component: c for c in states(10**9, Training(mode="full", zero=3, gpus=4))}
    away = {
        c.component: c for c in states(10**9, Training(mode="full", zero=3, gpus=4, offload="cpu"))
    }
    assert {cost.place for cost in away.values()} == {"host"}
    for name in away:
        assert away[name].bytes == 4 * here[name].bytes
    disk = Training(mode="full", zero=3, gpus=4, offload="nvme")
    assert {c.place for c in states(10**9, disk)} == {"disk"}


@pytest.mark.parametrize(
    "given",
    [
        {"mode": "blockwise", "gpus": 2},
        {"mode": "scales", "zero": 1},
        {"mode": "qlora", "zero": 3},
        {"mode": "full", "offload": "cpu"},
        {"mode": "full", "offload": "nvme", "zero": 2},
        {"mode": "full", "batch": 0},
        {"mode": "full", "zero": 4},
        {"mode": "lora", "rank": 0},
    ],
)
def test_what_nothing_trains_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        Training(**given)


def test_sequences_beyond_the_context_are_refused() -> None:
    model = spec("gemma3-1b")
    with pytest.raises(InvalidInputError, match="beyond the model's 32768"):
        list(costs_of(model, schemes_of(model, "q4_0"), Training(mode="full", length=32769)))


def test_ways_are_compared_on_a_card() -> None:
    name = "qwen3-8b"
    model = Model(name=name, spec=spec(name), schemes={}, quantized=False)
    training = Training(mode="full", checkpointing=True)
    plan = plan_training(model, card("rtx-4090"), training)
    assert not plan.fits
    assert plan.total() == sum(cost.bytes for cost in plan.costs if cost.place == "device")
    others = {
        other.mode: plan_training(model, card("rtx-4090"), other)
        for other in other_ways(model, training)
    }
    assert set(others) == {"lora", "qlora", "qat", "qat-lora", "blockwise", "scales", "adapter"}
    assert others["qlora"].fits
    assert others["blockwise"].fits
    shared = Training(mode="full", gpus=8, zero=3)
    assert plan_training(model, card("a100-40gb"), shared).fits


def test_weights_that_are_quantized_are_not_trained_as_if_they_were_not() -> None:
    model = spec("llama-3.2-1b")
    packed = Model(name="x", spec=model, schemes=schemes_of(model, "q4_0"), quantized=True)
    for mode in ("full", "lora", "blockwise", "scales"):
        with pytest.raises(InvalidInputError, match="not quantized"):
            plan_training(packed, card("rtx-3060"), Training(mode=mode))
    assert [other.mode for other in other_ways(packed, Training(mode="qlora"))] == ["adapter"]
    assert plan_training(packed, card("rtx-3060"), Training(mode="adapter", length=512)).fits


@pytest.mark.parametrize(
    ("model_type", "norm_bytes"), [("llama", 6.0), ("qwen3", 6.0), ("gemma3_text", 8.0)]
)
def test_activations_are_what_autograd_keeps(model_type: str, norm_bytes: float) -> None:
    """Of a layer more, in Transformers, with fused attention."""
    rows, shallow, deep = 96, 1, 3
    grown = (
        _kept_by_autograd(model_type, deep, rows) - _kept_by_autograd(model_type, shallow, rows)
    ) / (deep - shallow)
    model = spec_of(_tiny(model_type, 1).to_dict() | {"architectures": [_class(model_type)]})
    planned = rows * kept(model.layers[0], model, Constants(norm_bytes=norm_bytes))
    assert planned == pytest.approx(grown, rel=0.01)


def _class(model_type: str) -> str:
    names = {"llama": "Llama", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
    return f"{names[model_type]}ForCausalLM"


def _tiny(model_type: str, layers: int) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        model_type,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=128,
        attn_implementation="sdpa",
    )


def _kept_by_autograd(model_type: str, layers: int, rows: int) -> int:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_tiny(model_type, layers)).to(torch.bfloat16)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.model(torch.arange(rows)[None] % 128, use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)


def test_engines_are_told_what_is_planned() -> None:
    training = Training(mode="full", gpus=4, zero=3, offload="nvme", batch=2)
    config = deepspeed(training, live=10**8)
    assert config["train_batch_size"] == 8
    assert config["zero_optimization"]["offload_param"]["device"] == "nvme"
    assert accelerate(training)["deepspeed_config"]["zero_stage"] == 3
    assert json.loads(written("ds.json", training, live=10**8)) == config
    text = written("a.yaml", training, live=10**8)
    assert 'distributed_type: "DEEPSPEED"\n' in text
    assert "deepspeed_config:\n  gradient_accumulation_steps: 1\n" in text
    with pytest.raises(InvalidInputError, match=r"neither \.json nor \.yaml"):
        written("plan.toml", training, live=1)
    with pytest.raises(InvalidInputError, match="no way that DeepSpeed"):
        written("ds.json", Training(mode="blockwise"), live=1)
    with pytest.raises(InvalidInputError, match="master copies"):
        written("ds.json", replace(training, precision="bf16"), live=1)


def test_the_grids_of_the_plan_are_those_of_the_trainer() -> None:
    model = spec("llama-3.2-1b")
    matrix = next(tensor for tensor in model.tensors() if tensor.name == "layers.0.attn.q.weight")
    planned = {s for s in SCHEMES if on_grid(matrix, SCHEMES[s], Training(mode="qat"))}
    assert planned == set(GRIDS)
    groups = {name: GRIDS[name].group for name in planned}
    assert groups == {name: GROUPS.get(name, SCHEMES[name].block) for name in planned}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    text = (CONFIGS / "qwen3-8b.json").read_text(encoding="utf-8")
    (tmp_path / "m" / "config.json").write_text(text, encoding="utf-8")
    return tmp_path / "m"


def test_the_command_line_plans_a_training(halfbyte: Halfbyte, folder: Path) -> None:
    done = halfbyte("plan", folder, "--train", "qlora", "--machine", "rtx-4090", "--json")
    assert done.code == 0, done.err
    plan = done.document
    assert plan["schema"] == "halfbyte.plan/1"
    assert plan["fits"]
    assert {other["mode"] for other in plan["alternatives"]} == {
        "full", "lora", "qat", "qat-lora", "blockwise", "scales", "adapter",
    }  # fmt: skip
    assert plan["rules_of_thumb"][0]["bytes"] == 2 * spec("qwen3-8b").parameters
    emitted = folder / "accelerate.yaml"
    done = halfbyte("plan", folder, "--train", "full", "--machine", "rtx-4090", "--emit", emitted)
    assert done.code == 3
    assert "would fit" in done.err
    assert "mixed_precision" in emitted.read_text(encoding="utf-8")


def test_an_adapter_of_some_linears_is_smaller(halfbyte: Halfbyte, folder: Path) -> None:
    def trained(*targets: str) -> int:
        wanted = [part for target in targets for part in ("--target", target)]
        done = halfbyte("plan", folder, "--train", "adapter", *wanted, "--json")
        costs = {cost["component"]: cost["bytes"] for cost in done.document["costs"]}
        return costs["weights.trained"]

    model = spec("qwen3-8b")
    rows = sum(t.shape[0] + t.shape[1] for t in model.tensors() if ".attn.q.weight" in t.name)
    one, two = trained("q_proj"), trained("q_proj", "down_proj")
    assert one % (16 * rows) == 0 and one < two < trained()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--gpus", "2"),
        ("--target", "q_proj"),
        ("--train", "scales", "--target", "q_proj"),
        ("--train", "adapter", "--target", "nothing"),
        ("--train", "full", "--kv", "q8_0"),
        ("--train", "scales", "--gpus", "2"),
        ("--train", "full", "--seq", "1m"),
        ("--train", "full", "--offload", "cpu"),
        ("--train", "everything"),
    ],
)
def test_the_command_line_refuses_what_is_no_training(
    halfbyte: Halfbyte, folder: Path, arguments: tuple[str, ...]
) -> None:
    done = halfbyte("plan", folder, *arguments)
    assert done.code == 2
    assert done.err
