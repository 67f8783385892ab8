"""The same ids from every file kind: tokenizer.json, GGUF metadata, llama.cpp's golden files."""

from __future__ import annotations

import json
import random
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabulary_files import tokenizes_in_llama_cpp

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.text.assets import (
    TextAssets,
    assets_from_directory,
    assets_from_metadata,
    assets_to_metadata,
)
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.vocabulary import SPACE, TokenType, Vocabulary

TEXTS = ("wiki.utf8", "code_permissive.utf8", "multilingual.utf8", "technical.utf8", "c4.utf8")


@pytest.fixture(scope="module", params=["tiny-gemma4", "stories260K", "gpt2"])
def directory(request: pytest.FixtureRequest, shared_data: Path) -> Path:
    if request.param == "gpt2":
        return shared_data / "tokenizers" / "gpt2"
    return shared_data.parent / "models" / request.param


@pytest.fixture(scope="module")
def assets(directory: Path) -> TextAssets:
    found = assets_from_directory(directory)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def through_metadata(assets: TextAssets) -> Tokenizer:
    found = assets_from_metadata(assets_to_metadata(assets))
    assert found is not None
    return Tokenizer(found)


@pytest.fixture(scope="module")
def original(directory: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


def _runs(seed: int) -> str:
    dice = random.Random(seed)
    return "".join(
        dice.choice("- =a_*#\n.\t") * dice.randint(1, 25) for _ in range(dice.randint(1, 7))
    )


def test_metadata_carries_everything(assets: TextAssets) -> None:
    metadata = assets_to_metadata(assets)
    assert assets_from_metadata(metadata) == assets
    plain = (str, bool, int, float)
    for value in metadata.values():
        assert type(value) in plain or {type(item) for item in value} <= set(plain)


@pytest.mark.parametrize("name", TEXTS)
def test_real_texts_equal_tokenizer_json(
    name: str, shared_data: Path, through_metadata: Tokenizer, original: tokenizers.Tokenizer
) -> None:
    text = (shared_data / "calibration" / name).read_text()[:20_000]
    ids = through_metadata.encode(text, special=True)
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert through_metadata.decode(ids) == text == original.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.integers().map(_runs), st.text(alphabet="the \n▁<>|sturn0x")))
def test_any_text_equals_tokenizer_json(
    text: str, through_metadata: Tokenizer, original: tokenizers.Tokenizer
) -> None:
    ids = through_metadata.encode(text, special=True)
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert through_metadata.decode(ids) == original.decode(ids)


def test_special_strings_are_text_unless_asked_for(directory: Path, assets: TextAssets) -> None:
    tokenizer = Tokenizer(assets)
    control = assets.vocabulary.ids_of(TokenType.CONTROL)
    assert control
    for token_id in control:
        string = tokenizer.token(token_id)
        assert tokenizer.token_id(string) == token_id
        assert tokenizer.encode(string, special=True) == [token_id]
        assert token_id not in tokenizer.encode(string, special=False)
        assert tokenizer.decode(tokenizer.encode(string, special=False)) == string
        assert tokenizer.decode([token_id]) == ""


@cache
def _golden(path: Path) -> TextAssets:
    reader = gguf.GGUFReader(path)
    found = assets_from_metadata({key: field.contents() for key, field in reader.fields.items()})
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["llama-spm", "phi-3", "gpt-2"])
def test_golden_files(name: str, shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "ggml_vocab" / f"ggml-vocab-{name}.gguf"
    found = _golden(path)
    tokenizer = Tokenizer(found)
    texts = Path(f"{path}.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, special=False) == [int(word) for word in line.split()], text


def _sentencepiece(vocabulary: Vocabulary, text: str) -> list[str]:
    """SentencePiece by its definition: the best score merges, the leftmost among equals."""
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    pieces = list((SPACE + text).replace(" ", SPACE)) if text else []
    while True:
        joined = [a + b for a, b in pairwise(pieces)]
        candidates = [(-scores[j], i) for i, j in enumerate(joined) if j in scores]
        if not candidates:
            return pieces
        _, i = min(candidates)
        pieces[i : i + 2] = [joined[i]]


def test_scores_merge_as_sentencepiece_does(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "ggml_vocab" / "ggml-vocab-llama-spm.gguf"
    found = _golden(path)
    tokenizer = Tokenizer(found)
    sample = (shared_data / "calibration" / "c4.utf8").read_text()
    texts = [_runs(seed) for seed in range(40)] + [sample[i : i + 60] for i in range(0, 3000, 60)]
    for text in filter(str.isascii, texts):
        spelled = [tokenizer.token(i) for i in tokenizer.encode(text, special=False)]
        pieces = [
            f"<0x{ord(p):02X}>" if p in "\n\t" else p
            for p in _sentencepiece(found.vocabulary, text)
        ]
        assert spelled == pieces, text


@pytest.mark.parametrize("text", ["Once", " Once upon", "<s>Once</s> upon", "", "<s> a", "\n a"])
def test_a_space_at_the_first_stretch_only(text: str, stories260k: Path, tmp_path: Path) -> None:
    document = json.loads((stories260k / "tokenizer.json").read_text())
    scheme = {"replacement": SPACE, "prepend_scheme": "first", "split": False}
    document |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **scheme}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    found = assets_from_directory(tmp_path)
    assert found is not None
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert Tokenizer(found).encode(text, special=True) == ids
    assert Tokenizer(found).decode(ids) == theirs.decode(ids)


def test_a_piece_that_no_merge_makes_is_not_made(stories260k: Path, tmp_path: Path) -> None:
    document = json.loads((stories260k / "tokenizer.json").read_text())
    document["model"]["vocab"]["thehe"] = 512
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    found = assets_from_directory(tmp_path)
    assert found is not None
    again = assets_from_metadata(assets_to_metadata(found))
    assert again is not None
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = theirs.encode("a thehe", add_special_tokens=False).ids
    assert Tokenizer(again).encode("a thehe", special=False) == ids
    assert 512 not in ids
    assert Tokenizer(again).decode([512]) == "thehe"


def test_qwen2_splitter_equals_transformers(shared_data: Path) -> None:
    from transformers import Qwen2Tokenizer

    folder = shared_data / "tokenizers" / "qwen2"
    theirs = Qwen2Tokenizer.from_pretrained(str(folder))
    vocab: dict[str, int] = json.loads((folder / "vocab.json").read_text())
    merges = [m for m in (folder / "merges.txt").read_text().split("\n")[1:] if m]
    tokens = sorted(vocab, key=vocab.__getitem__)
    found = assets_from_metadata(_gpt2_metadata(tokens, merges, pre="qwen2"))
    assert found is not None
    ours = Tokenizer(found)
    sample = (shared_data / "calibration" / "multilingual.utf8").read_text()[:20_000]
    for text in (sample, "I'LL we've 12345 e\u0301\r\n\n  x", "\t \u00a0a", *map(_runs, range(30))):
        assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)


def test_llama3_splitter_equals_its_tokenizer_json(shared_data: Path, tmp_path: Path) -> None:
    document = json.loads((shared_data / "tokenizers" / "gpt2" / "tokenizer.json").read_text())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    level = document["pre_tokenizer"] | {"use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    document["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    found = assets_from_directory(tmp_path)
    assert found is not None
    assert found.vocabulary.pre == "llama-bpe"
    ours = Tokenizer(found)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    sample = (shared_data / "calibration" / "multilingual.utf8").read_text()[:20_000]
    for text in (sample, "I'LL 1234567 x\r\n\n  y", *map(_runs, range(30))):
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids


def _gpt2_metadata(tokens: list[str], merges: list[str], *, pre: str) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }


# What a damaged or hostile file may say, and the key that the error must name.
BAD: list[tuple[str, Any]] = [
    ("tokenizer.ggml.tokens", "abc"),
    ("tokenizer.ggml.tokens", [1, 2]),
    ("tokenizer.ggml.tokens", []),
    ("tokenizer.ggml.merges", [3]),
    ("tokenizer.ggml.merges", None),
    ("tokenizer.ggml.token_type", ["1", "1", "1"]),
    ("tokenizer.ggml.bos_token_id", 3),
    ("tokenizer.ggml.eos_token_id", -1),
    ("tokenizer.ggml.eot_token_id", True),
    ("tokenizer.ggml.padding_token_id", "1"),
    ("tokenizer.ggml.add_bos_token", 1),
    ("tokenizer.ggml.suppress_tokens", [0, 7]),
    ("tokenizer.chat_template", 5),
    ("tokenizer.chat_template", "x" * (2**16 + 1)),
    ("general.sampling.temp", float("nan")),
    ("general.sampling.top_k", -4),
    ("general.sampling.top_p", "0.9"),
]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_metadata_names_its_key(key: str, value: Any) -> None:
    metadata = _gpt2_metadata(["a", "b", "ab"], ["a b"], pre="gpt-2")
    assert assets_from_metadata(metadata) is not None
    with pytest.raises(IntegrityError, match=key):
        assets_from_metadata(metadata | {key: value})


@pytest.mark.parametrize(
    ("tokens", "merges"),
    [
        (["a", "b", "b"], []),
        (["a", "x" * 2000], []),
        (["a", "b", "ab"], ["a c"]),
        (["a", "b", "ab"], ["ab"]),
        (["a", "b", "ab"], ["ab "]),
    ],
)
def test_bad_vocabularies_are_refused(tokens: list[str], merges: list[str]) -> None:
    with pytest.raises(IntegrityError):
        found = assets_from_metadata(_gpt2_metadata(tokens, merges, pre="gpt-2"))
        assert found is not None
        Tokenizer(found)


def test_unknown_kinds_are_named() -> None:
    with pytest.raises(UnsupportedError, match="gpt-2, gpt-4o, lfm2"):
        assets_from_metadata(_gpt2_metadata(["a"], [], pre="falcon"))
    with pytest.raises(UnsupportedError, match="llama, gemma4, gpt2"):
        assets_from_metadata({"tokenizer.ggml.model": "bert"})
    assert assets_from_metadata({"general.architecture": "llama"}) is None


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Lowercase"}),
        ("pre_tokenizer", {"type": "Whitespace"}),
        ("model", {"type": "Unigram", "vocab": []}),
    ],
)
def test_a_tokenizer_json_with_other_parts_is_refused(
    part: str, value: Any, tiny_gemma4: Path, tmp_path: Path
) -> None:
    document = json.loads((tiny_gemma4 / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(document | {part: value}))
    with pytest.raises(UnsupportedError, match=value["type"]):
        assets_from_directory(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"model": {"vocab": {"a": -1}}}'])
def test_a_damaged_tokenizer_json_is_an_integrity_error(content: str, tmp_path: Path) -> None:
    assert assets_from_directory(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        assets_from_directory(tmp_path)


def test_rows_without_a_token_are_unused(stories260k: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((stories260k / "tokenizer.json").read_text())
    (tmp_path / "config.json").write_text('{"vocab_size": 520}')
    found = assets_from_directory(tmp_path)
    assert found is not None
    assert found.vocabulary.ids_of(TokenType.UNUSED) == list(range(512, 520))
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    with pytest.raises(IntegrityError, match="500 rows"):
        assets_from_directory(tmp_path)


def test_token_types_as_llama_cpp_expects_them(tiny_gemma4: Path) -> None:
    found = assets_from_directory(tiny_gemma4)
    assert found is not None
    metadata = assets_to_metadata(found)
    types = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True)
    )
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["<|turn>"] == types["<bos>"] == types["<|think|>"] == TokenType.CONTROL
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["\n"] == TokenType.NORMAL
    visible = {token for token, kind in types.items() if kind == TokenType.USER_DEFINED}
    assert visible == {
        "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
        "<|tool_response>", "<tool_response|>", '<|"|>',
    }  # fmt: skip


@pytest.mark.peers
def test_llama_cpp_tokenizes_what_we_write_as_we_do(assets: TextAssets, tmp_path: Path) -> None:
    # llama.cpp cuts Gemma 4's texts at line ends, because the real vocabulary has no token that
    # goes across one; the tiny model's has some.
    texts = [*map(_runs, range(200)), "<bos><|turn>user\nx<turn|>\n<s>I'LL \U0001f600 é ½ 12345"]
    if assets.vocabulary.model == "gemma4":
        texts = [text.replace("\n", " ") for text in texts]
    theirs, ours = tokenizes_in_llama_cpp(assets, tmp_path), Tokenizer(assets)
    for text in texts:
        assert ours.encode(text, special=True) == theirs(text)
