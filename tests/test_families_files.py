"""Every family through files: what Transformers saves, our GGUF of it, and what we read back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from oracle import CONFIGS, oracle, oracle_logits, relative_error
from safetensors.torch import load_file, save_file

from halfbyte.cli.inspect import command as inspect_command
from halfbyte.errors import UnsupportedError
from halfbyte.formats import gguf_writer
from halfbyte.formats.checkpoint import Checkpoint, read, write_gguf
from halfbyte.formats.gguf import GGUFFile
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode, encode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, recipe_of

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 60)]
# Not gemma4-narrow-mlp: it shares other layers' keys than llama.cpp would.
# llama.cpp's metadata has no key for gemma3's attention scale: 16 is the head dim.
EXPORTED = {
    name: {**config, **({"query_pre_attn_scalar": 16} if name.startswith("gemma3") else {})}
    for name, config in CONFIGS.items()
    if name.startswith(("qwen3", "gemma")) and name != "gemma4-narrow-mlp"
}


def logits_of(source: Checkpoint) -> np.ndarray:
    decoder = load(source, ReferenceOps())
    cache = decoder.new_cache(CacheShape(pages=1, page_len=64, ring_slack=64, kind="f32"))
    return decoder.forward([Chunk(slot=Slot(pages=[0]), token_ids=IDS, wanted="all")], cache)


def saved(config: dict[str, Any], to: Path) -> np.ndarray:
    """A random model in Transformers' own files; its logits."""
    model = oracle(config)
    model.save_pretrained(to)
    return oracle_logits(model, IDS)


def changed(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", EXPORTED)
def test_a_saved_model_and_its_gguf_are_transformers_model(name: str, tmp_path: Path) -> None:
    theirs = saved(EXPORTED[name], tmp_path / "model")
    source = read(tmp_path / "model")
    assert source.unused == ()
    assert relative_error(logits_of(source), theirs) < 1e-4
    write_gguf(source, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert found.spec == source.spec
    for tensor in source.spec.tensors():
        ours, stored = source.tensor(tensor.name), found.tensor(tensor.name)
        assert ours.data.tobytes() == stored.data.tobytes(), tensor.name


@pytest.mark.parametrize("name", EXPORTED)
def test_every_name_in_the_gguf_is_one_that_gguf_knows(name: str, tmp_path: Path) -> None:
    saved(EXPORTED[name], tmp_path / "model")
    write_gguf(read(tmp_path / "model"), tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kind = next(
        kind
        for kind, word in gguf.MODEL_ARCH_NAMES.items()
        if word == reader.fields["general.architecture"].contents()
    )
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    for tensor in reader.tensors:
        bare = tensor.name.rpartition(".")[0]
        parts = bare.split(".")
        template = f"blk.{{bid}}.{parts[2]}" if parts[0] == "blk" else bare
        assert template in known, tensor.name


def test_norms_of_gemma3_are_stored_as_their_multipliers(tmp_path: Path) -> None:
    saved(EXPORTED["gemma3"], tmp_path / "model")
    changed(
        tmp_path / "model",
        lambda tensors: tensors.update({k: t.bfloat16() for k, t in tensors.items()}),
    )
    source = read(tmp_path / "model")
    raw = load_file(tmp_path / "model" / "model.safetensors")
    write_gguf(source, tmp_path / "model.gguf")
    written = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    q_norm = "layers.1.attn.q_norm.weight"
    for ours, theirs, stored in (
        ("norm.weight", "model.norm.weight", "output_norm.weight"),
        (q_norm, "model.layers.1.self_attn.q_norm.weight", "blk.1.attn_q_norm.weight"),
    ):
        multiplier = 1 + raw[theirs].float()
        assert source.schemes[ours].name == "f32"
        assert torch.equal(decode(source.tensor(ours)), multiplier)
        assert torch.equal(torch.tensor(written[stored]), multiplier)
    assert source.schemes["layers.1.attn.q.weight"].name == "bf16"


@pytest.mark.parametrize(
    ("name", "says"), [("gemma3", "attention scale"), ("gemma4-narrow-mlp", "shares the keys")]
)
def test_what_a_gguf_cannot_say_is_refused(name: str, says: str, tmp_path: Path) -> None:
    saved(CONFIGS[name], tmp_path / "model")
    with pytest.raises(UnsupportedError, match=says):
        write_gguf(read(tmp_path / "model"), tmp_path / "model.gguf")


def test_stored_keys_of_layers_that_share_are_left_out(tmp_path: Path) -> None:
    """The published E2B and E4B carry them, and so do the GGUFs that llama.cpp makes of them."""
    theirs = saved(CONFIGS["gemma4-per-layer"], tmp_path / "model")
    extra = [f"model.layers.4.self_attn.{part}.weight" for part in ("k_norm", "k_proj", "v_proj")]
    changed(tmp_path / "model", lambda t: t.update({name: torch.ones(3) for name in extra}))
    source = read(tmp_path / "model")
    assert source.unused == tuple(extra)
    assert relative_error(logits_of(source), theirs) < 1e-4
    write_gguf(source, tmp_path / "own.gguf")
    file = GGUFFile(tmp_path / "own.gguf")
    tensors = {name: file.tensor(name) for name in file.infos}
    copies = ("blk.4.attn_k.weight", "blk.4.attn_k_norm.weight", "blk.4.attn_v.weight")
    tensors |= dict.fromkeys(copies, encode(torch.ones(3), SCHEMES["f32"]))
    gguf_writer.write(
        tmp_path / "model.gguf",
        metadata=file.metadata,
        layout={name: (tensor.scheme, tensor.shape) for name, tensor in tensors.items()},
        tensors=tensors.items(),
    )
    found = read(tmp_path / "model.gguf")
    assert found.unused == copies
    assert relative_error(logits_of(found), theirs) < 1e-4


def test_a_recipe_spares_routers_and_vectors(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 64, "intermediate_size": 128}
    per_layer = {"hidden_size_per_layer_input": 32}
    theirs = saved({**CONFIGS["gemma4-everything"], **wide, **per_layer}, tmp_path / "model")
    source = Quantized(read(tmp_path / "model"), recipe_of("q4_0"))
    schemes = {name: scheme.name for name, scheme in source.schemes.items()}
    assert schemes["embed.weight"] == "q6_k"
    assert schemes["per_layer.embed.weight"] == "q4_0"
    assert schemes["per_layer.project.weight"] == "q8_0"
    assert schemes["layers.0.experts.gate_up.weight"] == "q4_0"
    assert schemes["layers.0.experts.down.weight"] == "q4_0"
    assert schemes["layers.0.router.weight"] == schemes["layers.0.router.scale"] == "f32"
    write_gguf(source, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert found.schemes == source.schemes
    assert 0.01 < relative_error(logits_of(found), theirs) < 0.5


def test_an_embedding_with_more_rows_than_tokens(stories260k: Path, tmp_path: Path) -> None:
    """The larger Gemma 3 have 262208 rows without saying so; a GGUF has as many tokens."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {k: v for k, v in CONFIGS["gemma3"].items() if k != "vocab_size"} | small
    saved({**config, "query_pre_attn_scalar": 16}, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    shutil.copy(stories260k / "tokenizer.json", tmp_path)
    source = read(tmp_path)
    assert source.spec.vocab == 262208
    write_gguf(source, tmp_path / "model.gguf")
    found = read(tmp_path / "model.gguf")
    assert found.spec == source.spec
    assert found.assets is not None and len(found.assets.vocabulary.tokens) == 262208


def test_inspect_names_what_is_unusual(tmp_path: Path) -> None:
    saved(CONFIGS["gemma4-everything"], tmp_path)
    page = CliRunner().invoke(inspect_command, [str(tmp_path)], catch_exceptions=False).output
    assert "6 x 3 of 8 experts 32" in page
    assert "3 x keys and values of an earlier layer" in page
    assert "6 x embedding of its own 16" in page
    assert "3 x MLP 96" in page and "3 x MLP 192" in page
