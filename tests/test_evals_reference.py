"""What is kept of a reference: sound, found again, made anew when damaged. And what it is read on:
conversations whose answers count, and our own texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from oracle import CONFIGS, oracle, oracle_logits, source_of

from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.evals.chats import read_chats
from halfbyte.evals.reference import Reference
from halfbyte.evals.texts import OWN_TEXTS, Reading, Window, cut, read_text
from halfbyte.formats.checkpoint import read
from halfbyte.kernels.reference import ReferenceOps
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

RANDOM = np.random.default_rng(11)
WINDOWS = [Window(token_ids=RANDOM.integers(0, 128, n).tolist(), first=n // 3) for n in (20, 33)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path / "states"


@pytest.fixture
def reference() -> Callable[[str | None], Reference]:
    source = source_of(oracle(CONFIGS["gemma4-unified"]), CONFIGS["gemma4-unified"])
    return lambda weights: Reference(source, ReferenceOps(exact_rows=False), weights=weights)


def test_logits_are_those_of_transformers(reference: Callable[..., Reference]) -> None:
    """Of windows of unlike length, through the head in slices, soft-cap included."""
    [baseline] = reference(None).read([WINDOWS])
    theirs = oracle(CONFIGS["gemma4-unified"])
    expected = [oracle_logits(theirs, list(w.token_ids))[w.first : -1] for w in WINDOWS]
    expected = np.concatenate(expected)
    ours = np.concatenate([baseline.logits(0, 7), baseline.logits(7, len(expected))])
    np.testing.assert_allclose(ours, expected, atol=2e-4)


def test_states_are_kept_and_found_again(
    reference: Callable[..., Reference], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [made] = reference("a").read([WINDOWS])
    [file] = cache.iterdir()
    assert file.stat().st_size < 4 * 64 * (len(made.states) + 1)
    with monkeypatch.context() as patch:
        patch.setattr("halfbyte.evals.reference.load", lambda *_: pytest.fail("it was loaded"))
        [found] = reference("a").read([WINDOWS])
    np.testing.assert_array_equal(found.states[:], made.states[:])
    reference("b").read([WINDOWS])
    reference("a").read([WINDOWS[:1], WINDOWS[1:]])
    assert len([*cache.iterdir()]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for this process's maps")
def test_states_that_are_read_take_no_memory(
    reference: Callable[..., Reference], cache: Path
) -> None:
    [made] = reference("a").read([WINDOWS])
    whole = made.states[:]
    np.testing.assert_array_equal(made.states[2:5], whole[2:5])
    np.testing.assert_array_equal(made.states[5:999], whole[5:])
    [file] = cache.iterdir()
    assert file.name not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: b"\x01" + d[1:], lambda d: b""])
def test_damaged_states_are_made_anew(
    reference: Callable[..., Reference], cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    [made] = reference("a").read([WINDOWS])
    expected = np.array(made.states[:])
    [file] = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(damage(whole))
    [again] = reference("a").read([WINDOWS])
    np.testing.assert_array_equal(again.states[:], expected)
    assert file.read_bytes() == whole


def test_nothing_is_kept_of_a_reading_that_fails(
    reference: Callable[..., Reference], cache: Path
) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference("a").read([WINDOWS], stop)
    assert [*cache.iterdir()] == []


@pytest.fixture(scope="module")
def gemma(tiny_gemma4: Path) -> TextAssets:
    assets = read(tiny_gemma4).assets
    assert assets is not None
    return assets


def chats_of(assets: TextAssets, path: Path, **given: int) -> list[Window]:
    tokenizer = Tokenizer(assets)
    return read_chats(path, Chat(tokenizer, assets), tokenizer, Reading(**given))


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


CONVERSATION = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four, five."},
]


def test_answers_are_scored_to_their_end_and_nothing_else(
    gemma: TextAssets, tmp_path: Path
) -> None:
    rows = [{"messages": CONVERSATION}, {"prompt": "Six?", "response": "Seven."}]
    windows = chats_of(gemma, write_lines(tmp_path / "c.jsonl", rows))
    tokenizer = Tokenizer(gemma)
    told = [tokenizer.decode(window.targets, skip_special=False).strip() for window in windows]
    assert told == ["Two.<turn|>", "Four, five.<turn|>", "Seven.<turn|>"]
    before = tokenizer.decode(windows[1].token_ids[: windows[1].first + 1], skip_special=False)
    assert "One?" in before and "Two." in before and before.rstrip().endswith("<|turn>model")


def test_long_answers_are_cut_and_long_prompts_left_out(gemma: TextAssets, tmp_path: Path) -> None:
    rows = [
        {"prompt": "word " * 200, "response": "yes"},
        {"prompt": "Count.", "response": "one two three four five " * 20},
    ]
    path = write_lines(tmp_path / "c.jsonl", rows)
    [window] = chats_of(gemma, path, window=64)
    assert len(window.token_ids) == 64
    assert len(chats_of(gemma, path, window=512)) == 2
    assert len(chats_of(gemma, path, window=512, max_windows=1)) == 1
    with pytest.raises(InvalidInputError, match="leaves room"):
        chats_of(gemma, path, window=8)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]\n",
        "{not json}\n",
        '{"prompt": 3}\n',
        '{"messages": []}\n',
        '{"messages": ["hello"]}\n',
        '{"messages": [{"role": "user", "content": "x"}]}\n',
    ],
)
def test_lines_that_are_no_conversations(gemma: TextAssets, tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(content)
    with pytest.raises(HalfbyteError, match=r"c\.jsonl"):
        chats_of(gemma, path)


def test_our_own_texts_fill_a_window(gemma: TextAssets) -> None:
    tokenizer = Tokenizer(gemma)
    for name, path in OWN_TEXTS.items():
        if path.suffix == ".jsonl":
            assert len(chats_of(gemma, path)) == 17
        else:
            assert cut(read_text(path, tokenizer), Reading()), name
    assert "黄铜" in OWN_TEXTS["chinese"].read_text(encoding="utf-8")
