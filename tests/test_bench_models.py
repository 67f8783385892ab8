"""Random models for benches: the same from the same seed, in bounds, and whole files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_model import RandomModel, as_directory, blocks, plain, read_config

from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load
from halfbyte.numerics.codec import decode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, recipe_of

NAMES = ("llama-3.2-1b", "gemma3-1b", "gemma4-1b")
STORABLE = [name for name, scheme in SCHEMES.items() if scheme.ggml_type is not None]


def small(name: str) -> dict[str, Any]:
    """Two layers of the published width, and a small vocabulary."""
    return {**read_config(name, layers=2), "vocab_size": 512}


def logits(path: Path) -> np.ndarray:
    decoder = load(read(path), ReferenceOps(exact_rows=False))
    cache = decoder.new_cache(CacheShape(pages=1, ring_slack=64))
    chunk = Chunk(slot=Slot(pages=[0]), token_ids=range(5, 29), wanted="all")
    return decoder.forward([chunk], cache)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_runs_and_its_activations_stay_in_bounds(name: str, tmp_path: Path) -> None:
    model = RandomModel(spec_of(small(name)), recipe_of("q4_0"))
    write_gguf(model, tmp_path / "model.gguf")
    written = read(tmp_path / "model.gguf")
    assert written.spec == model.spec and written.schemes == model.schemes
    found = logits(tmp_path / "model.gguf")
    assert np.isfinite(found).all() and 0.7 < found.std() < 1.5


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_can_be_quantized(name: str, tmp_path: Path) -> None:
    config = small(name)
    model = RandomModel(spec_of(config), recipe_of("bf16"))
    as_directory(model, config, tmp_path / "model")
    source = read(tmp_path / "model")
    assert source.spec == model.spec
    norm = decode(source.tensor("norm.weight"))
    assert 0.9 < float(norm.mean()) < 1.1
    quantized = Quantized(source, recipe_of("q4_0"), method="rtn").tensor("layers.1.mlp.up.weight")
    assert quantized.scheme.name == "q4_0"


def test_a_tensor_is_a_function_of_the_seed_and_its_name() -> None:
    spec, recipe = spec_of(small("gemma4-1b")), recipe_of("q4_0")
    one, other = RandomModel(spec, recipe, seed=1), RandomModel(spec, recipe, seed=2)
    drawn = {name: tensor.data for name, tensor in one.tensors()}
    name = "layers.0.mlp.up.weight"
    assert (one.tensor(name).data == drawn[name]).all()
    assert (other.tensor(name).data != drawn[name]).any()
    assert (drawn["layers.0.mlp.gate.weight"] != drawn[name]).any()


@pytest.mark.parametrize("name", STORABLE)
def test_weights_have_the_size_that_was_asked_for(name: str) -> None:
    """In every scheme of a GGUF; not one scale is NaN or zero."""
    scheme = SCHEMES[name]
    draw = plain if scheme.block == 1 else blocks
    weight = decode(draw(np.random.Philox(key=3), scheme, (64, 4096), 0.02))
    assert weight.isfinite().all()
    assert float(weight.mean().abs()) < 0.001
    assert float(weight.square().mean().sqrt()) == pytest.approx(0.02, rel=0.05)


def test_a_config_is_found_by_name_or_path_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_config("gemma4-12b")), encoding="utf-8")
    spec = spec_of(read_config(str(path), layers=3))
    assert [layer.attention.window for layer in spec.layers] == [1024, 1024, None]
    assert len(spec_of(read_config("gemma4-12b")).layers) == 48


@pytest.mark.peers
@pytest.mark.parametrize("name", NAMES)
def test_llamacpp_runs_the_same_file(name: str, tmp_path: Path) -> None:
    llamacpp = pytest.importorskip("llamacpp", reason="needs the extra 'peers'")
    path = tmp_path / "model.gguf"
    write_gguf(RandomModel(spec_of(small(name)), recipe_of("q8_0")), path)
    peer = llamacpp.LlamaCpp(path)
    theirs = peer.logits(range(5, 29), 0)
    peer.close()
    assert np.abs(logits(path) - theirs).max() < 0.02 * np.abs(theirs).max()
