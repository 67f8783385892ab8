"""Checkpoints that other packages quantized: the same integers and scales, the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracle import GEMMA3, oracle, oracle_logits, relative_error
from packed_files import CONFIG, LAYOUTS, packed_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte.cli.inspect import command as inspect_command
from halfbyte.errors import HalfbyteError, UnsupportedError
from halfbyte.formats.checkpoint import Checkpoint, read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 40)]
Q = "model.layers.1.self_attn.q_proj"


def logits_of(source: Checkpoint) -> np.ndarray:
    decoder = load(source, ReferenceOps())
    cache = decoder.new_cache(CacheShape(pages=1, page_len=64, ring_slack=64, kind="f32"))
    return decoder.forward([Chunk(slot=Slot(pages=[0]), token_ids=IDS, wanted="all")], cache)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_packed_checkpoint_is_its_dequantized_twin(name: str, tmp_path: Path) -> None:
    twin = packed_checkpoint(tmp_path, LAYOUTS[name])
    source = read(tmp_path)
    weights = twin.state_dict()
    projections = [tensor for tensor in source.schemes if ".attn." in tensor or ".mlp." in tensor]
    assert {source.schemes[tensor].name for tensor in projections} == {LAYOUTS[name].scheme}
    for ours, theirs in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
        stored = source.tensor(f"layers.1.{ours}.weight")
        assert torch.equal(decode(stored), weights[f"model.layers.1.{theirs}.weight"])
    assert relative_error(logits_of(source), oracle_logits(twin, IDS)) < 1e-4
    assert bool(source.decoded) == (LAYOUTS[name].scheme == "f32")


def test_another_family(tmp_path: Path) -> None:
    config = {**GEMMA3, "hidden_size": 128, "intermediate_size": 160}
    twin = packed_checkpoint(tmp_path, LAYOUTS["compressed-32"], config)
    assert relative_error(logits_of(read(tmp_path)), oracle_logits(twin, IDS)) < 1e-4


def test_nf4_blocks_that_cross_rows(tmp_path: Path) -> None:
    """No scheme of ours has them; they are decoded."""
    twin = packed_checkpoint(tmp_path, LAYOUTS["nf4"], {**CONFIG, "hidden_size": 96})
    source = read(tmp_path)
    stored = decode(source.tensor("layers.1.attn.q.weight"))
    assert torch.equal(stored, twin.state_dict()[f"{Q}.weight"])
    assert "widths that are no multiple of 64" in source.decoded["layers.1.attn.q.weight"]
    assert relative_error(logits_of(source), oracle_logits(twin, IDS)) < 1e-4


def test_inspect_says_why_weights_are_decoded(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path, LAYOUTS["gptq-sorted"])
    said = CliRunner().invoke(inspect_command, [str(tmp_path)], catch_exceptions=False)
    assert "14 matrices to f32, exactly: columns grouped by activation order" in said.output


def test_a_config_without_a_method_is_that_of_plain_weights(tmp_path: Path) -> None:
    """As in checkpoints trained to be quantized later."""
    oracle(CONFIG).save_pretrained(tmp_path)
    settings(tmp_path, lambda config: config.update(quantization_config={"bits": 4}))
    assert {scheme.name for scheme in read(tmp_path).schemes.values()} == {"f32"}


def test_what_autoround_says_of_itself_changes_nothing(tmp_path: Path) -> None:
    packed_checkpoint(tmp_path, LAYOUTS["gptq-32"])
    before = decode(read(tmp_path).tensor("layers.1.attn.q.weight"))
    told = {"autoround_version": "0.16.1", "provider": "auto-round", "iters": 200, "amp": True}
    skipped = {"-:.*lm_head.*": {}}
    settings(
        tmp_path,
        lambda config: config["quantization_config"].update(told, data_type="int", dynamic=skipped),
    )
    assert torch.equal(decode(read(tmp_path).tensor("layers.1.attn.q.weight")), before)


def settings(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors")


def _weights_of_group(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["config_groups"]["group_0"]["weights"].update(more)


def _with(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.update(more)


UNREADABLE: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("gptq-32", _with(quant_method="aqlm"), r"quantization_config.quant_method is 'aqlm'"),
    ("gptq-32", _with(bits=8), r"quantization_config.bits is 8"),
    ("gptq-32", _with(checkpoint_format="marlin"), r"quantization_config.checkpoint_format is"),
    ("gptq-32", _with(pack_dtype="int16"), r"quantization_config.pack_dtype is 'int16'"),
    ("gptq-32", _with(is_marlin_format=True), r"quantization_config.is_marlin_format is True"),
    (
        "gptq-32",
        _with(dynamic={"x": {"bits": 8}}),
        r"quantization_config.dynamic packs some modules",
    ),
    ("gptq-32", _with(data_type="mx_fp"), r"quantization_config.data_type is 'mx_fp'"),
    ("awq-32", _with(group_size=16), r"groups of 16 weights"),
    ("awq-32", _with(version="gemv"), r"quantization_config.version is 'gemv'"),
    ("awq-32", _with(zero_point=False), r"quantization_config.zero_point is False"),
    ("nf4", _with(bnb_4bit_quant_type="fp4"), r"quantization_config.bnb_4bit_quant_type is 'fp4'"),
    ("nf4", _with(bnb_4bit_quant_storage="bfloat16"), r"bnb_4bit_quant_storage is 'bfloat16'"),
    ("compressed-32", _with(format="int-quantized"), r"quantization_config.format is"),
    ("compressed-32", _with(kv_cache_scheme={"num_bits": 8}), r"kv_cache_scheme' is unknown"),
    ("compressed-32", _with(quantization_status="frozen"), r"quantization_status is 'frozen'"),
    ("compressed-32", _weights_of_group(num_bits=8), r"group_0.weights.num_bits is 8"),
    ("compressed-32", _weights_of_group(type="float"), r"group_0.weights.type is 'float'"),
    ("compressed-32", _weights_of_group(strategy="block"), r"group_0.weights.strategy is 'block'"),
    ("compressed-32", _weights_of_group(dynamic=True), r"group_0.weights.dynamic' is unknown"),
]


@pytest.mark.parametrize(("name", "change", "message"), UNREADABLE)
def test_settings_we_do_not_read_are_named(
    name: str, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    packed_checkpoint(tmp_path, LAYOUTS[name])
    settings(tmp_path, lambda config: change(config["quantization_config"]))
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(tmp_path)
    assert caught.value.where == str(tmp_path)


CONTRADICTORY: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("gptq-zeros", _with(sym=True), r"quantization_config.sym is true, and its zero points"),
    ("gptq-sorted", _with(desc_act=False), r"quantization_config.desc_act is false, and"),
    ("gptq-32", _with(format="gptq_v2", checkpoint_format="gptq"), r"checkpoint_format and"),
    ("gptq-32", _with(group_size=64), r"'g_idx' names groups outside of 2"),
    ("gptq-32", _with(group_size=0), r"'quantization_config.group_size' is 0"),
    ("gptq-32", lambda config: config.pop("bits"), r"quantization_config.bits"),
    ("awq-32", _with(w_bit=3), r"quantization_config.bits and quantization_config.w_bit differ"),
    ("nf4", _with(bnb_4bit_use_double_quant=False), r"bnb_4bit_use_double_quant is False, and"),
    ("nf4", _with(load_in_8bit=True), r"one of load_in_4bit and load_in_8bit"),
    ("int8", _with(load_in_4bit=True, load_in_8bit=False), r"SCB|missing|is stored as"),
    ("compressed-32", _weights_of_group(group_size=128), r"4 scales in a row of 128, no zero"),
    ("compressed-zeros", _weights_of_group(symmetric=True), r"with zero points: none of"),
    ("compressed-32", _with(config_groups={}), r"quantization_config.config_groups"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONTRADICTORY)
def test_settings_that_contradict_the_tensors(
    name: str, change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    packed_checkpoint(tmp_path, LAYOUTS[name])
    settings(tmp_path, lambda config: change(config["quantization_config"]))
    with pytest.raises(HalfbyteError, match=message):
        list(read(tmp_path).tensors())


def _state(**more: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(stored: dict[str, torch.Tensor]) -> None:
        name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(stored[name].tolist())) | more
        stored[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _part(part: str, tensor: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], Any]:
    if tensor is None:
        return lambda stored: stored.pop(f"{Q}.{part}")
    return lambda stored: stored.update({f"{Q}.{part}": tensor})


def _broken(part: str, index: Any, value: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda stored: stored[f"{Q}.{part}"].__setitem__(index, value)


DAMAGED: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("gptq-32", _part("qweight", None), r"self_attn.q_proj.weight|not part of this model"),
    ("gptq-32", _part("scales", None), r"q_proj.scales: is missing"),
    ("gptq-32", _part("qzeros", torch.zeros(3, 16, dtype=torch.int32)), r"qzeros: has the shape"),
    ("gptq-32", _part("qweight", torch.zeros(8, dtype=torch.int32)), r"cannot have the shape"),
    (
        "gptq-32",
        _part("weight", torch.zeros(128, 128)),
        r"q_proj.weight.* is stored packed and plain",
    ),
    ("gptq-sorted", _broken("g_idx", 3, 4), r"'g_idx' names groups outside of 4"),
    ("gptq-sorted", _broken("g_idx", 3, -1), r"'g_idx' names groups outside of 4"),
    ("gptq-32", _broken("scales", (1, 7), float("inf")), r"layers.1.attn.q.weight: .*infinite"),
    ("gptq-sorted", _broken("scales", (1, 7), float("nan")), r"NaN or infinite"),
    ("compressed-32", _part("weight_shape", torch.tensor([128, 120])), r"none of|has the shape"),
    (
        "compressed-32",
        _part("weight_shape", torch.tensor([-1, 128])),
        r"weight_shape is \[-1, 128\]",
    ),
    ("compressed-32", _part("weight_shape", torch.tensor([2**40, 128])), r"shape"),
    ("compressed-32", _broken("weight_scale", (1, 2), float("nan")), r"NaN or infinite"),
    ("nf4", _state(blocksize=128), r"blocksize is 128"),
    ("nf4", _state(nested_blocksize=64), r"nested_blocksize is 64"),
    ("nf4", _state(quant_type="fp4"), r"quant_type is 'fp4'"),
    ("nf4", _state(shape=[128]), r"shape is \[128\]"),
    ("nf4", _state(shape=[2**30, 2**30]), r"shape"),
    ("nf4", _state(nested_offset=None), r"nested_offset is None"),
    ("nf4", _state(nested_offset="1"), r"nested_offset is '1'"),
    ("nf4", _state(mystery=1), r"mystery' is unknown"),
    ("nf4", _broken("weight.quant_map", 3, 0.5), r"quant_map' has other levels"),
    ("nf4", _broken("weight.nested_absmax", 0, float("nan")), r"NaN or infinite"),
    ("int8", _part("weight_format", torch.tensor(1, dtype=torch.uint8)), r"weight_format is not 0"),
    ("int8", _broken("SCB", 5, float("inf")), r"NaN or infinite"),
    ("int8", _part("SCB", torch.zeros(5)), r"SCB: has the shape"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGED)
def test_damaged_parts_are_named(
    name: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    packed_checkpoint(tmp_path, LAYOUTS[name])
    tensors(tmp_path, change)
    with pytest.raises(HalfbyteError, match=message):
        list(read(tmp_path).tensors())


@pytest.mark.parametrize("double", [True, False])
def test_what_bitsandbytes_saves_in_four_bits(double: bool, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = saved_by_bitsandbytes(
        tmp_path,
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
        ),
    )
    weight = model.model.layers[1].self_attn.q_proj.weight
    expected = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    source = read(tmp_path / "saved")
    assert source.schemes["layers.1.attn.q.weight"].name == ("nf4" if double else "f32")
    assert torch.equal(decode(source.tensor("layers.1.attn.q.weight")), expected)
    # Its kernel for this machine multiplies in bf16.
    assert relative_error(logits_of(source), oracle_logits(model, IDS)) < 2e-2


def test_what_bitsandbytes_saves_in_eight_bits(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = saved_by_bitsandbytes(tmp_path, BitsAndBytesConfig(load_in_8bit=True))
    linear = model.model.layers[1].self_attn.q_proj
    scale = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
    expected = bitsandbytes.functional.int8_vectorwise_dequant(linear.weight.data, scale)
    source = read(tmp_path / "saved")
    assert source.schemes["layers.1.attn.q.weight"].name == "int8"
    assert torch.equal(decode(source.tensor("layers.1.attn.q.weight")), expected)


def saved_by_bitsandbytes(directory: Path, config: BitsAndBytesConfig) -> Any:
    oracle(CONFIG).save_pretrained(directory / "plain")
    model = AutoModelForCausalLM.from_pretrained(
        directory / "plain", quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(directory / "saved")
    return model.eval()


@pytest.mark.parametrize(
    ("size", "symmetric"), [(32, True), (128, True), (None, True), (32, False)]
)
def test_what_compressed_tensors_saves(size: int | None, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    weights = saved_by_compressed_tensors(tmp_path, size, symmetric)
    source = read(tmp_path)
    for ours, theirs in (("attn.q", "self_attn.q_proj"), ("mlp.down", "mlp.down_proj")):
        found = decode(source.tensor(f"layers.1.{ours}.weight"))
        # The package multiplies in the type of the scale.
        assert torch.equal(found.bfloat16(), weights[f"model.layers.1.{theirs}.weight"])


def saved_by_compressed_tensors(
    directory: Path, size: int | None, symmetric: bool
) -> dict[str, torch.Tensor]:
    """A checkpoint quantized to nearest and packed by the package; its weights as it has them."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = json.loads(json.dumps(LAYOUTS["compressed-32"].config))
    group = config["config_groups"]["group_0"]["weights"]
    group |= {"group_size": size, "symmetric": symmetric}
    group["strategy"] = "group" if size else "channel"
    model = oracle(CONFIG).bfloat16()
    config |= {"quantization_status": "frozen"}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    rng = np.random.default_rng(1)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            fill_scales(module, size, symmetric, rng)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    compressor.decompress_model(model)
    return model.state_dict()


def fill_scales(module: Any, size: int | None, symmetric: bool, rng: np.random.Generator) -> None:
    groups = module.weight.float().unflatten(1, (-1, size or module.weight.shape[1]))
    scale = groups.abs().amax(-1) / 7.5
    module.weight_scale.data = scale.to(module.weight_scale.dtype)
    if not symmetric:
        zeros = rng.integers(-8, 8, scale.shape).astype("i1")
        module.weight_zero_point.data = torch.from_numpy(zeros)
