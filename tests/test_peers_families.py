"""Random models of every architecture: our GGUF in llama.cpp gives our logits.

llama.cpp looks GELU up in a table of f16; with the same table in the reference, what is left is the
order of sums in f32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CONFIGS, GEMMA3, oracle, source_of

from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.kernels.reference import ReferenceOps, ops
from halfbyte.models.cache import CacheShape, Slot
from halfbyte.models.decoder import Chunk
from halfbyte.models.load import load

pytestmark = pytest.mark.peers
llamacpp = pytest.importorskip("llamacpp", reason="needs the extra 'peers'")

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 128, 80)]
# llama.cpp has no key for the attention scale of gemma3: it takes the head dim.
IMPLIED_SCALE = {**GEMMA3, "query_pre_attn_scalar": 16}
LINEAR = {"rope_type": "linear", "factor": 8.0}
MODELS: dict[str, dict[str, Any]] = {
    **{name: CONFIGS[name] for name in ("llama", "llama3-rope", "qwen2", "qwen3", "qwen3-tied")},
    "gemma3": IMPLIED_SCALE,
    "gemma3-linear-rope": {**IMPLIED_SCALE, "rope_scaling": LINEAR},
    "gemma3-pattern-of-6": {**IMPLIED_SCALE, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    "gemma3-27b-scale": {**IMPLIED_SCALE, "num_hidden_layers": 62, "num_attention_heads": 2,
                         "query_pre_attn_scalar": 32},
    **{
        name: CONFIGS[name]
        for name in (
            "gemma4-unified",
            "gemma4-31b",
            "gemma4-own-values",
            "gemma4-experts",
            "gemma4-one-expert",
            "gemma4-per-layer",
            "gemma4-shared-kv",
            "gemma4-everything",
        )
    },
}  # fmt: skip


def typical_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a row over its largest value; the median of all rows.

    In a few rows a number falls to another side of an edge of the table, or a score of an expert's.
    """
    return float(np.median(np.abs(found - expected).max(-1) / np.abs(expected).max(-1)))


def looked_up(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation as ggml computes it."""
    if activation == "silu":
        return torch.nn.functional.silu(x)
    rounded = x.to(torch.float16).to(torch.float32)
    table = torch.nn.functional.gelu(rounded, approximate="tanh").to(torch.float16)
    return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, table.to(torch.float32)))


def ours(path: Path) -> np.ndarray:
    decoder = load(read(path), ReferenceOps())
    cache = decoder.new_cache(CacheShape(pages=1, page_len=80, ring_slack=80, kind="f32"))
    return decoder.forward([Chunk(slot=Slot(pages=[0]), token_ids=IDS, wanted="all")], cache)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_llamacpp(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(oracle(MODELS[name]), MODELS[name])
    path = tmp_path / "model.gguf"
    no_vocabulary = {
        "tokenizer.ggml.model": "no_vocab",
        f"{source.spec.architecture}.vocab_size": source.spec.vocab,
    }
    write_gguf(source, path, extra_metadata=no_vocabulary)
    peer = llamacpp.LlamaCpp(path)
    theirs = peer.logits(IDS, 0)
    peer.close()
    exact = typical_error(ours(path), theirs)
    monkeypatch.setattr(ops, "activated", looked_up)
    error = typical_error(ours(path), theirs)
    print(
        f"{name}: typical difference of a row {error:.1e} of its largest logit, {exact:.1e} exact"
    )
    assert error < 5e-4 and exact < 3e-3
