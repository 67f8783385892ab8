"""Directories for Transformers and vLLM: the same integers and scales, and the same logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, GEMMA3, GEMMA4, LLAMA, oracle, oracle_logits, relative_error
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import UnsupportedError
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.formats.directory import held_exactly, write_directory
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, Recipe
from halfbyte.text.tokenizer import Tokenizer

pytest.importorskip("compressed_tensors")

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 40)]
WIDE = {"hidden_size": 128, "intermediate_size": 256}
MODELS = {
    "llama": {**LLAMA, **WIDE},
    "llama-tied-biases": {**CONFIGS["llama-biases"], **WIDE, "tie_word_embeddings": True},
    "qwen2": {**CONFIGS["qwen2"], **WIDE},
    # Whose embedding multiplier, 16, is the same in every type.
    "gemma3": {**GEMMA3, **WIDE, "hidden_size": 256, "head_dim": 32},
    "gemma4": {**GEMMA4, **WIDE, "hidden_size": 256, "head_dim": 32},
}
KEPT = (("embed.weight", "bf16"), ("head.weight", "bf16"), ("*.router.weight", "f32"))


def recipe(scheme: str) -> Recipe:
    return Recipe(name=scheme, rules=(*KEPT, ("*", scheme)))


def logits_of(source: Checkpoint) -> np.ndarray:
    decoder = load(source, ReferenceOps())
    cache = decoder.new_cache(CacheShape(pages=1, page_len=64, ring_slack=64, kind="f32"))
    return decoder.forward([Chunk(slot=Slot(pages=[0]), token_ids=IDS, wanted="all")], cache)


def original(tmp_path: Path, model: str) -> Path:
    """bf16, so that only what is quantized is rounded."""
    path = tmp_path / "original"
    oracle(MODELS[model]).bfloat16().save_pretrained(path)
    return path


def theirs(path: Path, **options: Any) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    return oracle_logits(model.eval(), IDS)


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g128", "uint4-g32", "int4-g32-f16"])
@pytest.mark.parametrize("model", MODELS)
def test_transformers_computes_what_we_do(model: str, scheme: str, tmp_path: Path) -> None:
    origin = original(tmp_path, model)
    quantized = Quantized(read(origin), recipe(scheme))
    write_directory(quantized, origin, tmp_path / "w4")
    found = read(tmp_path / "w4")
    assert found.spec == quantized.spec
    for name, q in quantized.tensors():
        stored = found.tensor(name)
        if ".attn." in name or ".mlp." in name:
            assert stored.scheme == q.scheme, name
        assert torch.equal(decode(stored), decode(q)), name
    ours = logits_of(found)
    assert relative_error(theirs(tmp_path / "w4", dtype=torch.float32), ours) < 1e-4


def test_every_part_is_what_the_package_unpacks(tmp_path: Path) -> None:
    """Integers and zero points through compressed-tensors' own functions."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    origin = original(tmp_path, "llama")
    quantized = Quantized(read(origin), recipe("uint4-g32"))
    write_directory(quantized, origin, tmp_path / "w4")
    stored = load_file(tmp_path / "w4" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    shape = torch.Size(stored[f"{name}.weight_shape"].tolist())
    integers = unpack_from_int32(stored[f"{name}.weight_packed"], 4, shape)
    scale = stored[f"{name}.weight_scale"]
    zeros = unpack_from_int32(
        stored[f"{name}.weight_zero_point"], 4, torch.Size([shape[0], scale.shape[1]]), packed_dim=0
    )
    groups = (integers.view(shape[0], -1, 32) - zeros[..., None]).float()
    weights = (groups * scale.float()[..., None]).view(shape)
    assert torch.equal(weights, decode(quantized.tensor("layers.1.mlp.down.weight")))


def test_logits_within_the_rounding_of_the_scales_type(tmp_path: Path) -> None:
    """As a user loads it: bf16 weights, each scale * q rounded once more."""
    origin = original(tmp_path, "llama")
    quantized = Quantized(read(origin), recipe("int4-g32"))
    write_directory(quantized, origin, tmp_path / "w4")
    ours = logits_of(read(tmp_path / "w4"))
    assert relative_error(theirs(tmp_path / "w4"), ours) < 2e-2


def test_settings_that_differ_by_matrix(tmp_path: Path) -> None:
    origin = original(tmp_path, "llama")
    rules = (*KEPT, ("*.mlp.down.weight", "uint4-g128"), ("*.o.weight", "bf16"), ("*", "int4-g32"))
    quantized = Quantized(read(origin), Recipe(name="mixed", rules=rules))
    write_directory(quantized, origin, tmp_path / "w4")
    found = read(tmp_path / "w4")
    assert {found.schemes[f"layers.0.{n}.weight"].name for n in ("attn.q", "mlp.down")} == {
        "int4-g32",
        "uint4-g128",
    }
    config = json.loads((tmp_path / "w4" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert "model.layers.0.self_attn.o_proj" in config["ignore"] and "lm_head" in config["ignore"]
    ours = logits_of(found)
    assert relative_error(theirs(tmp_path / "w4", dtype=torch.float32), ours) < 1e-4


def test_a_quantized_head(tmp_path: Path) -> None:
    origin = original(tmp_path, "llama")
    rules = (("embed.weight", "bf16"), ("*", "int4-g32"))
    write_directory(
        Quantized(read(origin), Recipe(name="head", rules=rules)), origin, tmp_path / "w4"
    )
    found = read(tmp_path / "w4")
    assert found.schemes["head.weight"].name == "int4-g32"
    ours = logits_of(found)
    assert relative_error(theirs(tmp_path / "w4", dtype=torch.float32), ours) < 1e-4


def test_the_text_part_of_a_real_checkpoint(tiny_gemma4: Path, tmp_path: Path) -> None:
    """A config that wraps a text model is cut down to it; the tokenizer comes along."""
    quantized = Quantized(read(tiny_gemma4), recipe("int4-g32"))
    write_directory(quantized, tiny_gemma4, tmp_path / "w4")
    found = read(tmp_path / "w4")
    assert found.spec == quantized.spec and found.assets == quantized.assets
    config = json.loads((tmp_path / "w4" / "config.json").read_text())
    assert config["model_type"] == "gemma4_unified_text" and "audio_config" not in config
    ours = logits_of(found)
    assert relative_error(theirs(tmp_path / "w4", dtype=torch.float32), ours) < 1e-4


@pytest.mark.parametrize("origin", [Path, lambda path: path.parent])
def test_from_a_gguf(tiny_gemma4: Path, tmp_path: Path, origin: Callable[[Path], Path]) -> None:
    """Q4_0 to int4 in groups of 32 under fp16 scales, without a change; all files are written."""
    rules = (("embed.weight", "bf16"), ("*", "q4_0"))
    made = Quantized(read(tiny_gemma4), Recipe(name="q", rules=rules))
    write_gguf(made, tmp_path / "q.gguf")
    source = read(tmp_path / "q.gguf")
    kept = tuple(
        (tensor.name, held_exactly(tensor.name, tensor.shape, source.schemes[tensor.name]).name)
        for tensor in source.spec.tensors()
    )
    exact = Quantized(source, Recipe(name="as stored", rules=kept))
    write_directory(exact, origin(tmp_path / "q.gguf"), tmp_path / "w4")
    found = read(tmp_path / "w4")
    assert found.spec == source.spec and found.assets == source.assets
    for name, q in source.tensors():
        assert torch.equal(decode(found.tensor(name)), decode(q)), name
    assert found.schemes["layers.0.mlp.up.weight"].name == "int4-g32-f16"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "w4")
    assert source.assets is not None
    ids = Tokenizer(source.assets).encode_raw("My dear Jane")
    assert tokenizer("My dear Jane")["input_ids"] == ids
    ours = logits_of(found)
    assert relative_error(theirs(tmp_path / "w4", dtype=torch.float32), ours) < 1e-4


@pytest.mark.parametrize(
    ("name", "shape", "scheme", "message"),
    [
        ("embed.weight", (128, 128), "q6_k", r"embed.weight: is q6_k; compressed-tensors holds"),
        ("embed.weight", (128, 128), "q4_0", r"embed.weight: is a table of embeddings"),
        ("layers.0.attn.q.weight", (128, 128), "q8_0", r"is q8_0; compressed-tensors holds"),
        ("layers.0.attn.q.weight", (128, 128), "nf4", r"is nf4; compressed-tensors holds"),
        ("layers.0.experts.down.weight", (8, 128, 32), "int4-g32", r"is a stack of experts"),
    ],
)
def test_what_the_form_cannot_hold(
    name: str, shape: tuple[int, ...], scheme: str, message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        held_exactly(name, shape, SCHEMES[scheme])
