"""`distill` from the command line: better or nothing, resumed to the bit, refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Halfbyte

from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.formats.lora_writing import updates_for, write_adapter
from halfbyte.formats.manifest import described
from halfbyte.numerics.codec import encode
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import SCHEMES, recipe_of
from halfbyte.text.assets import TextAssets
from halfbyte.training import loop
from halfbyte.training.modes import MODES

STORY = (
    "Once upon a time there was a little girl named Lily. She loved to play in the park with her "
    "big red ball. One day, her mom said: look, it is going to rain, we have to go home now. Lily "
    "was sad, but she took her ball and went with her mom. At home they had hot soup, and Lily "
    "told her dad about the birds that she saw. "
)
QUICK = (
    "--steps", "6", "--batch", "2", "--window", "32", "--measure-every", "3", "--threads", "1",
)  # fmt: skip


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{n} {STORY}" for n in range(60)), encoding="utf-8")
    return path


def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "adapter"])
def test_every_mode_comes_out_better_or_says_so(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path, mode: str
) -> None:
    out, held = tmp_path / "out.gguf", tmp_path / "held.txt"
    held.write_text("One day Tim and his dog saw a big tree. " * 40, encoding="utf-8")
    done = halfbyte(
        "distill", stories260k, "-o", out, "--data", stories, "--held-out", held, "--mode", mode,
        "--start", start_of(halfbyte, stories260k, tmp_path), *QUICK, "--json",
    )  # fmt: skip
    assert not (tmp_path / "out.gguf.work" / "new" / "out.gguf").exists() or done.code == 7
    if done.code == 7:
        assert not out.exists()
        assert "nothing was written" in done.err
        return
    assert done.code == 0, done.err
    told = done.document
    assert told["mode"] == mode
    assert not (tmp_path / "out.gguf.work").exists()
    kl = [text["kl"]["mean"] for text in told["texts"]]
    assert kl[0] < told["before"][0]["kl"]["mean"]
    made = described(out)
    assert made["method"] == "distill"
    assert made["measurements"]["texts"][0]["kl"]["mean"] == kl[0]
    assert made["distillation"]["moved"]
    assert fingerprint(read(out)) != fingerprint(read(stories260k))


def start_of(halfbyte: Halfbyte, model: Path, folder: Path) -> Path:
    path = folder / "rtn.gguf"
    assert halfbyte("quantize", model, "-o", path, "--method", "rtn").code == 0
    return path


@pytest.mark.parametrize("mode", ["blockwise", "adapter"])
def test_killed_and_started_again_it_ends_in_the_same_bytes(
    halfbyte: Halfbyte,
    stories260k: Path,
    stories: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    start = start_of(halfbyte, stories260k, tmp_path)
    suffix = "" if mode == "adapter" else ".gguf"

    def distill(name: str) -> Any:
        return halfbyte(
            "distill", stories260k, "-o", tmp_path / f"{name}{suffix}", "--data", stories,
            "--mode", mode, "--start", start, *QUICK,
        )  # fmt: skip

    def made(name: str) -> dict[str, bytes]:
        """What was trained, in its place or refused one."""
        path = tmp_path / f"{name}{suffix}"
        if not path.exists():
            path = tmp_path / f"{name}{suffix}.work" / "new" / path.name
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.glob("adapter*")}
        return {name: q.data.tobytes() for name, q in read(path).tensors()}

    assert distill("whole").code in (0, 7)
    taken = loop._Run._advance
    left = [4]

    def stopped(self: Any) -> bool:
        if left[0] == 0:
            left[0] = 3
            raise KeyboardInterrupt
        left[0] -= 1
        found = taken(self)
        self._save()
        return found

    monkeypatch.setattr(loop._Run, "_advance", stopped)
    for _ in range(20):
        try:
            done = distill("parts")
        except KeyboardInterrupt:
            continue
        if done.code in (0, 7):
            break
    assert made("parts") == made("whole")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A task that is soon learned: one sort of answer to one sort of question."""
    path = tmp_path / "chats.jsonl"
    said = [
        {"prompt": f"How many birds are in tree {n}?", "response": f"Tree {n} has {n} red birds."}
        for n in range(300)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in said), encoding="utf-8")
    return path


def test_an_adapter_learns_a_task_beside_a_quantized_model(
    halfbyte: Halfbyte, tiny_gemma4: Path, chats: Path, tmp_path: Path
) -> None:
    body, out = start_of(halfbyte, tiny_gemma4, tmp_path), tmp_path / "birds"
    before, held = body.read_bytes(), tmp_path / "held.jsonl"
    held.write_text(
        json.dumps({"prompt": "How many birds are in tree 777?", "response": "Tree 777 has 777"}),
        encoding="utf-8",
    )
    common = (
        "distill", tiny_gemma4, "-o", out, "--task-data", chats, "--mode", "adapter",
        "--target", "q_proj", "--target", "down_proj", "--rank", "4", "--rate", "0.003",
    )  # fmt: skip
    done = halfbyte(*common, "--start", body, *QUICK, "--steps", "12", "--held-out", held, "--json")
    assert done.code == 0, done.err
    told = done.document
    assert told["mode"] == "adapter" and told["beside"] == str(body) and told["path"] == str(out)
    outcome = told["outcomes"]["adapter"]
    assert outcome["best"] < 0.9 * outcome["before"]
    assert told["texts"][0]["perplexity"] < told["before"][0]["perplexity"]
    assert body.read_bytes() == before
    made = described(out)
    assert made["method"] == "distill" and made["recipe"] == "adapter"
    assert made["body"]["name"] == body.stem
    assert made["measurements"]["texts"][0]["perplexity"] == told["texts"][0]["perplexity"]
    shown = halfbyte("inspect", out, "--json").document
    assert {item["name"].rpartition(".")[2] for item in shown["modules"]} == {"q_proj", "down_proj"}
    measured = halfbyte("eval", body, "--lora", out, "--text", held, "--json").document
    assert measured["texts"][0]["perplexity"] == told["texts"][0]["perplexity"]
    again = halfbyte(*common, "--start", body, *QUICK)
    assert again.code == 2 and "another task" in again.err


def test_what_an_adapter_cannot_be_is_refused(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    body, out = start_of(halfbyte, stories260k, tmp_path), tmp_path / "out"

    def refused(*arguments: str | Path, target: Path = out) -> str:
        done = halfbyte("distill", stories260k, "-o", target, "--data", stories, *arguments)
        assert done.code == 2, done.err
        return done.err

    mode = ("--mode", "adapter")
    assert "--start" in refused(*mode)
    assert "an adapter is a directory" in refused(
        *mode, "--start", body, target=tmp_path / "x.gguf"
    )
    assert "no c_attn" in refused(*mode, "--start", body, "--target", "c_attn")
    assert "--mode adapter" in refused("--target", "q_proj")
    assert "--mode adapter" in refused("--alpha", "8")
    assert "holds a model" in refused(*mode, "--start", body, target=stories260k)


def test_adapters_are_merged_before_all_else(
    halfbyte: Halfbyte, stories260k: Path, tiny_gemma4: Path, stories: Path, tmp_path: Path
) -> None:
    spec, out = read(stories260k).spec, tmp_path / "out"
    updates = updates_for(spec, rank=2, alpha=2, targets=["down_proj"])
    chance = torch.Generator().manual_seed(0)
    pairs = {
        it.weight: tuple(
            encode(0.3 * torch.randn(shape, generator=chance), SCHEMES["f32"])
            for shape in it.shapes
        )
        for it in updates
    }
    adapter, held = tmp_path / "poet", tmp_path / "held.txt"
    held.write_text("One day Tim and his dog saw a big tree. " * 60, encoding="utf-8")
    adapter.mkdir()
    write_adapter(adapter, spec, updates, pairs, base="stories")  # type: ignore[arg-type]
    done = halfbyte(
        "distill", stories260k, "--merge-lora", f"{adapter}@0.5", "-o", out, "--data", stories,
        "--mode", "scales", "--held-out", held, *QUICK, "--force", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = done.document
    assert (out / "report.html").exists()
    assert described(out)["merged"][0]["name"] == "poet"
    assert described(out)["merged"][0]["scale"] == 0.5
    assert described(out)["measurements"]["against"]["name"] == "stories260K + poet@0.5"
    flags = ("--text", held, "--against", stories260k, "--json")
    near = halfbyte("eval", out, *flags, "--against-lora", f"{adapter}@0.5").document["texts"][0]
    assert near["kl"]["mean"] == told["texts"][0]["kl"]["mean"]
    far = halfbyte("eval", out, *flags).document["texts"][0]
    assert far["kl"]["mean"] > 2 * near["kl"]["mean"]
    other = halfbyte(
        "distill", tiny_gemma4, "--merge-lora", adapter, "-o", out, "--data", stories, *QUICK
    )
    assert other.code == 4 and "does not fit" in other.err
    missing = halfbyte(
        "distill", stories260k, "--merge-lora", tmp_path, "-o", out, "--data", stories, *QUICK
    )
    assert missing.code == 2 and "no adapter" in missing.err


def test_what_is_better_stays(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    assert halfbyte("quantize", stories260k, "-o", out, "--recipe", "q8_0").code == 0
    before = out.read_bytes()
    done = halfbyte(
        "distill", stories260k, "-o", out, "--data", stories, "--mode", "scales",
        "--start", start_of(halfbyte, stories260k, tmp_path), *QUICK,
    )  # fmt: skip
    assert done.code == 7
    assert "KL" in done.err
    assert out.read_bytes() == before


def test_what_cannot_be_learned_from_is_refused(
    halfbyte: Halfbyte, stories260k: Path, tiny_gemma4: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"

    def refused(*arguments: str | Path) -> str:
        done = halfbyte("distill", stories260k, "-o", out, *QUICK, *arguments)
        assert done.code == 2, done.err
        return done.err

    assert "nothing to learn from" in refused()
    empty = tmp_path / "empty.txt"
    empty.write_text("", encoding="utf-8")
    assert "fill a window" in refused("--data", empty)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"prompt": "Why?", "response": "So."}), encoding="utf-8")
    assert "chat template" in refused("--data", chats)
    assert "stands in this text" in refused("--data", stories, "--held-out", stories)
    other = tmp_path / "other.gguf"
    assert halfbyte("quantize", tiny_gemma4, "-o", other, "--method", "rtn").code == 0
    assert "vocabulary" in refused("--data", stories, "--start", other)
    eight = tmp_path / "eight.gguf"
    assert halfbyte("quantize", stories260k, "-o", eight, "--recipe", "q8_0").code == 0
    assert "--recipe" in refused("--data", stories, "--start", eight)
    assert "context" in refused("--data", stories, "--window", "100000")
    short = tmp_path / "short.txt"
    short.write_text("Too short to measure on.", encoding="utf-8")
    assert "do not fill one window" in refused("--data", stories, "--held-out", short)
    assert "and no task" in refused("--task-data", stories, "--mode", "blockwise")
    done = halfbyte("distill", eight, "-o", out, "--data", stories, *QUICK)
    assert done.code == 2 and "is quantized" in done.err
    swapped = tmp_path / "swapped.gguf"
    write_gguf(Swapped(read(stories260k), recipe_of("q4_0")), swapped)
    assert "another vocabulary" in refused("--data", stories, "--start", swapped)


class Swapped(Quantized):
    """Two tokens have changed places."""

    @property
    def assets(self) -> TextAssets:
        assets = super().assets
        assert assets is not None
        *tokens, last, first = assets.vocabulary.tokens
        vocabulary = replace(assets.vocabulary, tokens=(*tokens, first, last))
        return replace(assets, vocabulary=vocabulary)


def test_conversations_that_hold_nothing_to_learn_are_refused(
    halfbyte: Halfbyte, tiny_gemma4: Path, tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"

    def refused(said: dict[str, Any], *arguments: str) -> str:
        chats.write_text(json.dumps(said), encoding="utf-8")
        done = halfbyte(
            "distill", tiny_gemma4, "-o", tmp_path / "out.gguf", "--data", chats, *QUICK, *arguments
        )
        assert done.code == 2, done.err
        return done.err

    asked = {"role": "user", "content": "Why?"}
    assert "no answers" in refused({"messages": [asked]})
    assert "no prompt leaves room" in refused({"prompt": "Why? " * 99, "response": "So."})
    assert "do not fill a window" in refused({"prompt": "Why?", "response": "So."})
    chats.write_text("", encoding="utf-8")
    done = halfbyte("distill", tiny_gemma4, "-o", tmp_path / "out.gguf", "--task-data", chats)
    assert done.code == 2 and "has no lines" in done.err


def test_a_training_that_diverges_says_so_and_writes_nothing(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    done = halfbyte(
        "distill", stories260k, "-o", out, "--data", stories, "--mode", "full", "--rate", "1e30",
        "--scale-rate", "1e30", "--start", start_of(halfbyte, stories260k, tmp_path), *QUICK,
    )  # fmt: skip
    assert done.code == 7
    assert "full diverged behind step" in done.err and "nothing was written" in done.err
    assert not out.exists()


def test_a_budget_that_nothing_fits_is_told(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    done = halfbyte(
        "distill", stories260k, "-o", tmp_path / "out.gguf", "--data", stories,
        "--budget", "1MB", *QUICK,
    )  # fmt: skip
    assert done.code == 3
    assert "--at-once" in done.err


def test_flags_come_from_a_file(
    halfbyte: Halfbyte, stories260k: Path, stories: Path, tmp_path: Path
) -> None:
    config = tmp_path / "qat.toml"
    config.write_text(f'data = ["{stories}"]\nstepps = 3\n', encoding="utf-8")
    done = halfbyte("distill", stories260k, "-o", tmp_path / "o.gguf", "--config", config)
    assert done.code == 2
    assert "no flag is called stepps" in done.err
    config.write_text(f'data = ["{stories}"]\nbudget = "1MB"\nwindow = 32\n', encoding="utf-8")
    done = halfbyte("distill", stories260k, "-o", tmp_path / "o.gguf", "--config", config)
    assert done.code == 3, done.err
