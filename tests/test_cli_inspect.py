"""Inspect: the whole page of known models, and what it says of the unusual."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from inspected import FIXTURES, PAGES, page

from halfbyte.errors import IntegrityError
from halfbyte.formats.checkpoint import read, write_gguf


@pytest.mark.usefixtures("tiny_gemma4", "stories260k")
@pytest.mark.parametrize("name", FIXTURES)
def test_a_page_is_the_one_that_was_read(name: str) -> None:
    """After a change that is meant: `python -m inspected`, as its module says."""
    assert FIXTURES[name]() == (PAGES / f"{name}.txt").read_text(encoding="utf-8")


def copy_of(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    for file in to.iterdir():
        file.chmod(0o644)
    return to


def test_a_stop_that_only_the_template_knows(tiny_gemma4: Path, tmp_path: Path) -> None:
    copy = copy_of(tiny_gemma4, tmp_path / "copy")
    (copy / "generation_config.json").write_text('{"eos_token_id": 1}')
    assert "stops        1 '<eos>', 50 '<|tool_response>' from the template, " in page(copy)
    assert "106 '<turn|>' from the template" in page(copy)


def test_padding_is_noted(stories260k: Path, tmp_path: Path) -> None:
    """A GGUF with fewer tokens than rows."""
    path = tmp_path / "model.gguf"
    tokens = [f"<{index}>" for index in range(500)]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 500,
        "tokenizer.ggml.token_type": [1] * 500,
    }
    write_gguf(read(stories260k), path, extra_metadata=metadata)
    assert "500 tokens (512 rows in the embedding)" in page(path)


def test_a_token_without_a_row_is_refused(stories260k: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {
        "tokenizer.ggml.tokens": [f"<{index}>" for index in range(513)],
        "tokenizer.ggml.scores": [0.0] * 513,
        "tokenizer.ggml.token_type": [1] * 513,
    }
    write_gguf(read(stories260k), path, extra_metadata=metadata)
    with pytest.raises(IntegrityError, match="513 tokens and the embedding 512 rows"):
        _ = read(path).assets


def test_a_tokenizer_json_with_too_many_tokens_is_refused(
    stories260k: Path, tmp_path: Path
) -> None:
    copy = copy_of(stories260k, tmp_path / "copy")
    document = json.loads((copy / "tokenizer.json").read_text())
    document["model"]["vocab"]["zzz"] = 512
    (copy / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="512 is outside the 512 rows"):
        _ = read(copy).assets
