"""Every published size through files, in both dialects of config.json, cut to a few layers.

The names and shapes in the files are those of Transformers on the meta device, the widths are the
published ones. A file of zeros takes no disk, however large its tables are; random weights are
compared with Transformers with small tables (the largest takes 12 GB of memory).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracle import meta_tensors, oracle, oracle_logits, relative_error
from published import PUBLISHED, text_of
from transformers import AutoConfig

from halfbyte.families import spec_of
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.load import load

PREFIXES = {"gemma3": "language_model.model.", "gemma4": "model.language_model."}


def cut(config: dict[str, Any]) -> dict[str, Any]:
    """The config with one sliding and one full layer; twice that where layers share keys."""
    text = text_of(config)
    kinds = ["sliding_attention", "full_attention"]
    shares = text.get("num_kv_shared_layers", 0) > 0
    changes: dict[str, Any] = {"num_hidden_layers": 4 if shares else 2}
    if shares:
        changes["num_kv_shared_layers"] = 2
    if "layer_types" in text:
        changes["layer_types"] = kinds * (2 if shares else 1)
    elif text["model_type"].startswith("gemma3"):
        changes["sliding_window_pattern"] = 2
    cut_text = {**text, **changes}
    return {**config, "text_config": cut_text} if "text_config" in config else cut_text


def rewritten(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's config as Transformers 5 writes it."""
    settings = dict(text_of(config))
    written = AutoConfig.for_model(settings.pop("model_type"), **settings).to_dict()
    return json.loads(json.dumps(written))


def write_zeros(config: dict[str, Any], to: Path) -> None:
    """config.json and a model.safetensors of bf16 zeros, as one large hole."""
    prefix = PREFIXES.get(config["model_type"].removesuffix("_unified"), "model.")
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in meta_tensors(text_of(config)).items():
        stored = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        end = offset + 2 * prod(shape)
        header[stored] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (to / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + offset)
    (to / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_both_dialects_of_a_published_config_give_one_spec(name: str) -> None:
    config, _ = PUBLISHED[name]
    assert spec_of(rewritten(config)) == spec_of(config)


@pytest.mark.parametrize("dialect", ["published", "rewritten"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_is_read(name: str, dialect: str, tmp_path: Path) -> None:
    config = cut(PUBLISHED[name][0])
    write_zeros(config, tmp_path)
    if dialect == "rewritten":
        (tmp_path / "config.json").write_text(json.dumps(rewritten(config)))
    source = read(tmp_path)
    assert source.spec == spec_of(config)
    assert source.unused == ()
    assert sum(prod(entry.stored.shape) for entry in source.entries.values()) == (
        source.spec.parameters
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_runs(name: str, tmp_path: Path) -> None:
    """Through every op in the published widths, tables and experts included, up to the head."""
    write_zeros(cut(PUBLISHED[name][0]), tmp_path)
    decoder = load(read(tmp_path), ReferenceOps(decoded_bytes=0, exact_rows=False))
    rows = Rows(token_ids=[1, 2], spans=[Span(start=0, count=2, pages=(), ring=0)])
    caches: list[ScratchKV] = []
    for layer in decoder.spec.layers:
        caches.append(ScratchKV() if layer.kv_source is None else caches[layer.kv_source])
    states = decoder.states(rows, caches)
    assert states.shape == (2, decoder.spec.hidden) and not states.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_size_equals_transformers(name: str, tmp_path: Path) -> None:
    """Random weights in the published widths; a vocabulary of 1024.

    The embedding multiplier is the one that the published weights, in bf16, are multiplied by.
    """
    text = {**text_of(cut(PUBLISHED[name][0])), "vocab_size": 1024}
    if "vocab_size_per_layer_input" in text:
        text["vocab_size_per_layer_input"] = 1024
    model = oracle(text)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("embed_scale"):
            buffer.copy_(buffer.bfloat16())
    ids = [int(token) for token in np.random.default_rng(7).integers(3, 1024, 40)]
    theirs = oracle_logits(model, ids)
    model.save_pretrained(tmp_path)
    del model
    decoder = load(read(tmp_path), ReferenceOps(decoded_bytes=0, exact_rows=False))
    rows = Rows(token_ids=ids, spans=[Span(start=0, count=40, pages=(), ring=0)])
    caches: list[ScratchKV] = []
    for layer in decoder.spec.layers:
        caches.append(ScratchKV() if layer.kv_source is None else caches[layer.kv_source])
    ours = decoder.logits(decoder.states(rows, caches)).numpy()
    assert relative_error(ours, theirs) < 1e-4
