"""Assets as the files of a directory: the same assets when read, the same ids elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from halfbyte.formats.gguf import GGUFFile
from halfbyte.text.assets import (
    TextAssets,
    assets_from_directory,
    assets_from_metadata,
    assets_to_metadata,
)
from halfbyte.text.files import files_of
from halfbyte.text.tokenizer import Tokenizer

TEXT = "Hello world!  Two  spaces,\n\ta tab; 123456 \u00e9\u00e8 \u4e2d\u6587 \U0001f600 it's."


def through_a_gguf(assets: TextAssets | None) -> TextAssets:
    assert assets is not None
    found = assets_from_metadata(assets_to_metadata(assets))
    assert found is not None
    return found


def written(assets: TextAssets, to: Path) -> TextAssets:
    to.mkdir()
    for name, text in files_of(assets).items():
        (to / name).write_text(text, encoding="utf-8")
    found = assets_from_directory(to, num_rows=len(assets.vocabulary.tokens))
    assert found is not None
    return found


def unscored(assets: TextAssets) -> TextAssets:
    """A tokenizer.json keeps the order that scores give, not the scores."""
    scores = (0.0,) * len(assets.vocabulary.scores)
    return replace(assets, vocabulary=replace(assets.vocabulary, scores=scores))


def check(assets: TextAssets, to: Path) -> None:
    found = written(assets, to)
    assert unscored(found) == unscored(assets)
    ids = Tokenizer(assets).encode_raw(TEXT)
    assert Tokenizer(found).encode_raw(TEXT) == ids
    theirs = AutoTokenizer.from_pretrained(to)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == Tokenizer(assets).decode(ids)


@pytest.mark.parametrize("model", ["tiny_gemma4", "stories260k"])
def test_a_model_whose_assets_came_from_a_gguf(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    directory = request.getfixturevalue(model)
    assets = through_a_gguf(assets_from_directory(directory))
    check(assets, tmp_path / "d")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "d")
    if assets.template is not None:
        messages = [{"role": "user", "content": "Hi"}]
        original = AutoTokenizer.from_pretrained(directory)
        for tokenizer in (theirs, original):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert text == original.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_vocabularies_of_llama_cpp(name: str, shared_data: Path, tmp_path: Path) -> None:
    file = shared_data / "tokenizers" / "ggml_vocab" / f"ggml-vocab-{name}.gguf"
    assets = assets_from_metadata(GGUFFile(file).metadata)
    assert assets is not None
    check(assets, tmp_path / "d")


def test_rows_without_a_token_stay_without_one(stories260k: Path, tmp_path: Path) -> None:
    assets = assets_from_directory(stories260k, num_rows=600)
    assert assets is not None and assets.vocabulary.tokens[599] == "[PAD599]"
    assert written(assets, tmp_path / "d").vocabulary.types == assets.vocabulary.types
    assert len(AutoTokenizer.from_pretrained(tmp_path / "d")) == 512
