"""GGUF files that hold a vocabulary and nothing else, and llama.cpp's reading of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from halfbyte.text.assets import TextAssets, assets_to_metadata

SIZES = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "head_count",
    "rope_dimension_count",
)


def tokenizes_in_llama_cpp(assets: TextAssets, folder: Path) -> Callable[[str], list[int]]:
    """Text to ids by llama.cpp, special strings parsed and without BOS."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = folder / "vocabulary.gguf"
    write_vocabulary(path, assets_to_metadata(assets))
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=True)


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> None:
    """By the gguf package, with sizes that satisfy llama.cpp's loader."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for name in SIZES:
        getattr(writer, f"add_{name}")(8)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        if key.endswith("_id"):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32}
            kinds.get(type(value), writer.add_string)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
