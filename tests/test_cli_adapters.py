"""Adapters at the command line and in Python: named, scaled, switched, shown, measured."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_files import PLAIN, tensors_of, write_adapter

from halfbyte import LLM, LoadOptions
from halfbyte.cli import main
from halfbyte.cli.adapters import named
from halfbyte.cli.commands import obey
from halfbyte.cli.conversation import Conversation
from halfbyte.cli.run import Manner
from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import demo_path

Halfbyte = Callable[..., tuple[int, str, str]]
PROMPT = "The sea was"


def adapter_of(path: Path, seed: int) -> Path:
    """A random adapter of the bundled model that changes what it says."""
    spec = read(demo_path()).spec
    shapes = {
        f"model.layers.{index}.{module}": shape
        for index, layer in enumerate(spec.layers)
        for module, shape in (
            ("self_attn.q_proj", (layer.attention.query_width, spec.hidden)),
            ("mlp.down_proj", (spec.hidden, layer.mlp.width)),
        )
    }
    return write_adapter(path, {n: 0.1 * t for n, t in tensors_of(shapes, seed=seed).items()})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(adapter_of(root / name, seed)) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def halfbyte(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Halfbyte:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["halfbyte", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with pytest.raises(SystemExit) as leave:
            main()
        printed = capsys.readouterr()
        return int(leave.value.code or 0), printed.out, printed.err

    return run


def answer(halfbyte: Halfbyte, *arguments: object) -> dict[str, Any]:
    code, out, _ = halfbyte(
        "run", "demo", PROMPT, "--raw", "--temperature", 0, "--max-tokens", 12, "--json", *arguments
    )
    assert code == 0
    return json.loads(out)


def test_run_with_adapters(halfbyte: Halfbyte, adapters: dict[str, str]) -> None:
    plain = answer(halfbyte)
    one, two = (answer(halfbyte, "--lora", path) for path in adapters.values())
    assert plain["adapter"] is None and plain["stats"]["memory"]["adapters_bytes"] == 0
    assert one["adapter"] == "one" and two["adapter"] == "two"
    texts = [plain["token_ids"], one["token_ids"], two["token_ids"]]
    assert texts[0] != texts[1] != texts[2] != texts[0]
    both = answer(halfbyte, "--lora", f"b={adapters['two']}", "--lora", adapters["one"])
    assert both["adapter"] == "b" and both["token_ids"] == two["token_ids"]
    memory = both["stats"]["memory"]
    assert memory["adapters_bytes"] == 2 * one["stats"]["memory"]["adapters_bytes"] > 0
    parts = ("weights_bytes", "adapters_bytes", "kv_bytes")
    assert memory["planned_bytes"] > sum(memory[part] for part in parts)
    added = memory["planned_bytes"] - plain["stats"]["memory"]["planned_bytes"]
    assert memory["adapters_bytes"] <= added < 2 * memory["adapters_bytes"]  # and what they compute
    silent = answer(halfbyte, "--dtype", "f32", "--lora", f"{adapters['one']}@0")
    assert silent["token_ids"] == answer(halfbyte, "--dtype", "f32")["token_ids"]


def test_their_memory_is_told(halfbyte: Halfbyte, adapters: dict[str, str]) -> None:
    code, _, err = halfbyte(
        "run", "demo", PROMPT, "--raw", "--max-tokens", 2, "--stats", "--lora", adapters["one"]
    )
    assert code == 0 and ", adapters " in err


def test_replies_switch_between_adapters(adapters: dict[str, str]) -> None:
    llm = LLM("demo", LoadOptions(context=64), adapters=adapters)
    ids, greedy = llm.raw_ids(PROMPT), llm.sampling(temperature=0)
    names = (None, "one", "two", "one", None)
    said = [
        llm.reply(ids, sampling=greedy, max_tokens=10, adapter=name).finish().token_ids
        for name in names
    ]
    assert said[0] == said[4] and said[1] == said[3]
    assert len(set(said)) == 3
    with pytest.raises(InvalidInputError, match="'three'"):
        llm.reply(ids, adapter="three").finish()


def test_a_chat_changes_its_adapter(
    adapters: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM("demo", LoadOptions(context=128), adapters=adapters)
    manner = Manner(
        raw=False,
        system=None,
        think=None,
        ignore_eos=True,
        max_tokens=8,
        sampling={"temperature": 0, "seed": 0},
        adapter="one",
    )
    conversation = Conversation(llm, manner, stats=False)
    said: list[str] = []
    for command in ("/adapter one", "/adapter two", "/adapter", "/adapter one"):
        obey(conversation, command)
        conversation.clear()
        conversation.say(PROMPT)
        said.append(capsys.readouterr().out)
    assert said[0] == said[3] and len(set(said)) == 3
    with pytest.raises(InvalidInputError, match="'three'"):
        obey(conversation, "/adapter three")
    assert conversation.manner.adapter == "one"


def test_inspect_shows_an_adapter(halfbyte: Halfbyte, adapters: dict[str, str]) -> None:
    code, page, _ = halfbyte("inspect", adapters["one"])
    layers = len(read(demo_path()).spec.layers)
    assert code == 0 and "LoRA of somebody/base" in page
    assert f"{layers} x q_proj" in page and "alpha 4" in page
    facts = json.loads(halfbyte("inspect", adapters["one"], "--json")[1])
    assert facts["schema"] == "halfbyte.inspect/1" and facts["adapter"] == "lora"
    counted = sum(m["rank"] * (m["inputs"] + m["outputs"]) for m in facts["modules"])
    assert facts["bytes"] == 4 * counted and len(facts["modules"]) == 2 * layers
    assert {m["scale"] for m in facts["modules"]} == {2.0}


def test_eval_measures_with_an_adapter(
    halfbyte: Halfbyte, adapters: dict[str, str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20)
    ask = ("eval", "demo", "--text", text, "--window", 64, "--max-windows", 2, "--dtype", "f32",
           "--kv", "f32", "--json")  # fmt: skip

    def perplexity(*arguments: object) -> float:
        return json.loads(halfbyte(*ask, *arguments)[1])["texts"][0]["perplexity"]

    plain, changed = perplexity(), perplexity("--lora", adapters["one"])
    assert changed > 1.01 * plain
    assert perplexity("--lora", f"{adapters['one']}@0") == pytest.approx(plain, rel=1e-6)
    document = json.loads(halfbyte(*ask, "--lora", adapters["one"], "--against", "demo")[1])
    against = document["texts"][0]
    assert against["reference_perplexity"] == pytest.approx(plain, rel=1e-6)
    assert against["perplexity"] == pytest.approx(changed, rel=1e-6)


def test_an_adapter_of_another_model_is_refused(halfbyte: Halfbyte, tmp_path: Path) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (8, 8)}
    path = write_adapter(tmp_path, tensors_of(shapes), {**PLAIN, "target_modules": "q_proj"})
    code, _, err = halfbyte("run", "demo", PROMPT, "--raw", "--lora", path)
    assert code == 4 and "does not fit" in err and "somebody/base" in err


def test_what_is_left_aside_is_said(halfbyte: Halfbyte, tmp_path: Path) -> None:
    spec = read(demo_path()).spec
    shapes = {
        "model.layers.0.self_attn.q_proj": (spec.layers[0].attention.query_width, spec.hidden),
        "model.vision_tower.layers.0.self_attn.q_proj": (8, 8),
    }
    path = write_adapter(tmp_path, tensors_of(shapes), {**PLAIN, "target_modules": ".*q_proj"})
    code, _, err = halfbyte("run", "demo", PROMPT, "--raw", "--max-tokens", 1, "--lora", path)
    assert code == 0 and "1 updates of parts that do not run are left aside" in err


def test_names_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert named(["x/poet@0.5", "law=y/poet", "a=b"]) == {
        "poet": "x/poet@0.5",
        "law": "y/poet",
        "a=b": "a=b",
    }
    assert named(["x/y=z/poet"]) == {"poet": "x/y=z/poet"}
    assert named(["."]) == {tmp_path.name: "."}
    for given in (["x/poet", "y/poet"], ["=x"]):
        with pytest.raises(InvalidInputError, match="adapter"):
            named(given)
