"""Every word splitter: the cuts of llama.cpp and of the models' own files, and nothing lost."""

from __future__ import annotations

import json
import random
import unicodedata
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from vocabulary_files import tokenizes_in_llama_cpp

from halfbyte.text.assets import TextAssets, assets_from_directory
from halfbyte.text.splitters import ALIASES, SPLITTERS, splitter_of
from halfbyte.text.stream import StreamDecoder
from halfbyte.text.tokenizer import Tokenizer

SAMPLES = ("multilingual.utf8", "code_permissive.utf8")
TELLING = "McDONALD'S don'T 12345½ e\u0301\u0301t!/\r\n\n  x-y 'tis xYxYxY x\u0301x\u0301x"


@pytest.fixture(scope="module")
def lines(shared_data: Path) -> list[str]:
    """Stretches of real texts, across line ends."""
    texts = [(shared_data / "calibration" / name).read_text()[:100_000] for name in SAMPLES]
    return [text[i : i + 400] for text in texts for i in range(0, len(text), 400)]


@pytest.fixture(scope="module")
def uncut(lines: list[str], tmp_path_factory: pytest.TempPathFactory) -> TextAssets:
    """A vocabulary trained on text without any cuts: its merges tell where a splitter cuts."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*lines, *map(characters, range(300)), *[TELLING] * 9], trainer)
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    folder = tmp_path_factory.mktemp("uncut")
    bpe.save(str(folder / "tokenizer.json"))
    found = assets_from_directory(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module", params=SPLITTERS)
def tokenizer(request: pytest.FixtureRequest, uncut: TextAssets) -> Tokenizer:
    return Tokenizer(cut_by(uncut, request.param))


def cut_by(assets: TextAssets, pre: str) -> TextAssets:
    """The same vocabulary with another splitter."""
    return replace(assets, vocabulary=replace(assets.vocabulary, pre=pre))


def characters(seed: int) -> str:
    """Forty assigned characters of any script, many of them ASCII and white space."""
    dice = random.Random(seed)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0x80, 0x3000), (0x3000, 0x20000), (9, 14)]
    drawn = (chr(dice.randrange(*dice.choice(ranges))) for _ in iter(int, 1))
    return "".join(islice((c for c in drawn if unicodedata.category(c) not in ("Cn", "Cs")), 40))


def without_marks(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c)[0] != "M")


def test_the_expressions_are_those_of_transformers() -> None:
    names = GGUF_PRE_TOKENIZER_SPLITS.keys() & {*SPLITTERS, *ALIASES}
    assert names >= {"llama-bpe", "qwen2", "qwen35", "tekken", "gpt-4o"}
    for name in names:
        assert splitter_of(name).patterns == (GGUF_PRE_TOKENIZER_SPLITS[name],)


@pytest.mark.peers
@pytest.mark.parametrize("pre", [*SPLITTERS, *ALIASES])
def test_the_cuts_are_llama_cpps(
    pre: str, uncut: TextAssets, lines: list[str], tmp_path: Path
) -> None:
    texts = [TELLING, *lines, *map(characters, range(500))]
    if splitter_of(pre).compose:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    if pre in ("tekken", "gpt-4o", "llama4"):  # llama.cpp takes marks for no part of a word here
        texts = [without_marks(text) for text in texts]
    assets = cut_by(uncut, pre)
    theirs, ours = tokenizes_in_llama_cpp(assets, tmp_path), Tokenizer(assets)
    for text in texts:
        assert ours.encode(text, special=True) == theirs(text), text


def test_no_two_splitters_are_the_same(uncut: TextAssets) -> None:
    cut = {
        name: tuple(Tokenizer(cut_by(uncut, name)).encode(TELLING, special=False))
        for name in SPLITTERS
    }
    assert len(set(cut.values())) == len(SPLITTERS)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(st.text(), st.integers(0, 10**6).map(characters)))
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    """At once and id by id; composed where the model's makers compose."""
    ids = tokenizer.encode(text, special=False)
    decoder = StreamDecoder(tokenizer)
    streamed = "".join([*map(decoder.push, ids), decoder.finish()])
    assert tokenizer.decode(ids) == streamed
    assert streamed in (text, unicodedata.normalize("NFC", text))
    assert tokenizer.encode(streamed, special=False) == ids


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(data: st.DataObject, tokenizer: Tokenizer) -> None:
    """Ids that no text gives: halves of characters in any order."""
    ids = data.draw(st.lists(st.integers(0, 300), max_size=30))
    decoder = StreamDecoder(tokenizer)
    assert "".join([*map(decoder.push, ids), decoder.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("digits", [True, False])
def test_digits_apart_are_smollm(digits: bool, shared_data: Path, tmp_path: Path) -> None:
    document = json.loads((shared_data / "tokenizers" / "gpt2" / "tokenizer.json").read_text())
    parts = [{"type": "Digits", "individual_digits": True}] if digits else []
    parts.append(document["pre_tokenizer"])
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document))
    found = assets_from_directory(tmp_path)
    assert found is not None and found.vocabulary.pre == ("smollm" if digits else "gpt-2")
    ours, theirs = Tokenizer(found), tokenizers.Tokenizer.from_file(str(path))
    for text in (TELLING, *map(characters, range(100))):
        assert ours.encode(text, special=True) == theirs.encode(text).ids
