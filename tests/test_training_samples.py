"""What is learned from: windows, what counts in them, and data that nothing can be learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import read
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.training.samples import Mix, SampleReader, Samples

Turns = list[dict[str, str]]


@pytest.fixture(scope="module")
def reader(tiny_gemma4: Path) -> SampleReader:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    return SampleReader(assets)


@pytest.fixture(scope="module")
def tokenizer(tiny_gemma4: Path) -> Tokenizer:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    return Tokenizer(assets)


@pytest.fixture(scope="module")
def chat(tiny_gemma4: Path, tokenizer: Tokenizer) -> Chat:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    return Chat(tokenizer, assets)


def chats(path: Path, *conversations: Turns) -> Path:
    lines = [json.dumps({"messages": turns}) for turns in conversations]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def turns(*contents: str) -> Turns:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_every_token_of_a_text_counts(reader: SampleReader, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("It was a dark night, and nobody was at home. " * 60, encoding="utf-8")
    samples = reader.read([path], Mix(count=5, length=32))
    assert samples.token_ids.shape == (5, 33)
    assert samples.weights.shape == (5, 32)
    assert (samples.weights == 1).all()
    assert (samples.token_ids[:, 0] == 2).all()  # the BOS


def test_answers_count_and_prompts_by_their_share(
    reader: SampleReader, chat: Chat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = chats(tmp_path / "a.jsonl", turns("Who is she?", "My aunt.", "And he?", "A stranger."))
    mix = Mix(count=1, length=64, prompts=0.25)
    passages = [*reader.passages(path, mix, np.random.default_rng(0))]
    said = [
        [token for token, w in zip(passage.token_ids, passage.weights, strict=True) if w == 1]
        for passage in passages
    ]
    assert chat.closing_id is not None
    answers = [tokenizer.encode(text, special=False) for text in ("My aunt.", "A stranger.")]
    assert said == [[*answer, chat.closing_id] for answer in answers]
    assert all(set(passage.weights) == {0.25, 1.0} for passage in passages)
    for passage, count in zip(passages, (1, 3), strict=True):
        asked = chat.render(turns("Who is she?", "My aunt.", "And he?")[:count])
        assert [*passage.token_ids][: len(asked) - 1] == asked[1:]


def test_an_empty_thought_counts_nothing(reader: SampleReader, tmp_path: Path) -> None:
    thought = "<|channel>thought\n<channel|>"
    with_, without = (
        next(reader.passages(chats(tmp_path / name, turns("Why?", text)), Mix(count=1), _chance()))
        for name, text in (("a.jsonl", f"{thought}So."), ("b.jsonl", "So."))
    )
    assert sum(with_.weights) == pytest.approx(sum(without.weights))
    assert len(with_.token_ids) > len(without.token_ids)
    full = next(
        reader.passages(
            chats(tmp_path / "c.jsonl", turns("Why?", "<|channel>thought\nHm.<channel|>So.")),
            Mix(count=1),
            _chance(),
        )
    )
    assert sum(full.weights) > sum(without.weights)


def test_the_same_seed_gives_the_same_windows(reader: SampleReader, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"The {n} of {n * n}." for n in range(3000)), encoding="utf-8")
    first, second, other = (
        reader.read([path], Mix(count=9, length=32, seed=seed)).token_ids for seed in (0, 0, 1)
    )
    assert (first == second).all()
    assert not (first == other).all()


def test_files_give_equal_shares_as_far_as_they_go(reader: SampleReader, tmp_path: Path) -> None:
    long_, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long_.write_text("She went away. " * 900, encoding="utf-8")
    short.write_text("He stayed here. " * 30, encoding="utf-8")
    samples = reader.read([long_, short], Mix(count=20, length=32))
    assert len(samples) == 20
    held = samples.split(4)
    assert [len(part) for part in held] == [16, 4]
    assert len(Samples.joined(held)) == 20


def test_data_that_nothing_can_be_learned_from(reader: SampleReader, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("Too short.", encoding="utf-8")
    with pytest.raises(InvalidInputError, match="do not fill a window of 64"):
        reader.read([empty], Mix(count=4, length=64))
    long_ = chats(tmp_path / "long.jsonl", turns("Why, then? " * 200, "Because."))
    with pytest.raises(InvalidInputError, match="no prompt leaves room") as caught:
        reader.read([long_], Mix(count=4, length=64))
    assert "--window" in str(caught.value)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": 3}\n', encoding="utf-8")
    with pytest.raises(InvalidInputError, match="messages"):
        reader.read([broken], Mix(count=4, length=64))


def test_conversations_need_a_template(stories260k: Path, tmp_path: Path) -> None:
    assets = read(stories260k).assets
    assert assets is not None
    path = chats(tmp_path / "a.jsonl", turns("Why?", "So."))
    with pytest.raises(InvalidInputError, match="no chat template"):
        SampleReader(assets).read([path], Mix(count=1, length=16))


def _chance() -> np.random.Generator:
    return np.random.default_rng(0)
