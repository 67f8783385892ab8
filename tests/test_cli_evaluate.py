"""eval at the command line: texts, tasks, a gate whose word is kept, and who hears of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commandline import Halfbyte

from halfbyte.cli.compare import table
from halfbyte.evals.fidelity import Divergence, Fidelity
from halfbyte.workflows import Side

STORY = "Once upon a time there was a little dog. He liked to play. " * 40


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY)
    return path


@pytest.fixture
def artefact(halfbyte: Halfbyte, stories260k: Path, tmp_path: Path) -> Path:
    path = tmp_path / "stories.gguf"
    assert halfbyte("quantize", stories260k, "-o", path, "--recipe", "q8_0").code == 0
    return path


def manifest(artefact: Path) -> dict[str, Any]:
    return json.loads(Path(f"{artefact}.manifest.json").read_text())


def test_several_texts_by_name(halfbyte: Halfbyte, stories260k: Path, story: Path) -> None:
    arguments = ("eval", stories260k, "--window", 64, "--max-windows", 2, "--json")
    texts = ("--text", f"one={story}", "--text", story)
    document = halfbyte(*arguments, *texts).document
    assert [text["name"] for text in document["texts"]] == ["one", "story.txt"]
    assert document["texts"][0]["perplexity"] == document["texts"][1]["perplexity"]
    assert document["window"] == 64 and document["texts"][0]["kl"] is None
    for wrong in (("--text", "absent.txt"), ("--text", story, "--text", story)):
        assert halfbyte(*arguments, *wrong).code == 2


def test_without_texts_our_own_are_read(halfbyte: Halfbyte) -> None:
    few = ("--max-windows", 1, "--threads", 1)
    document = halfbyte("eval", "demo", "--against", "demo", *few, "--json").document
    names = [text["name"] for text in document["texts"]]
    assert names == ["english", "chinese", "code", "chat"]
    assert all(text["kl"]["mean"] < 0.01 for text in document["texts"])


def test_a_gate_s_word_is_kept_in_the_manifest(
    halfbyte: Halfbyte, stories260k: Path, artefact: Path, story: Path
) -> None:
    prompt = ("run", artefact, "Once", "--raw", "--max-tokens", 2)
    assert "never measured against its original" in halfbyte(*prompt).err
    measure = ("eval", artefact, "--against", stories260k, "--text", story, "--window", 64)
    assert halfbyte(*measure).code == 0
    assert "measurements" not in manifest(artefact)
    assert halfbyte(*measure, "--gate", "default").code == 0
    found = manifest(artefact)["measurements"]
    assert found["gate"] == {"name": "default", "passed": True, "misses": []}
    assert found["texts"][0]["kl"]["mean"] > 0 and found["against"]["name"] == "stories260K"
    assert "measured" not in halfbyte(*prompt).err
    assert halfbyte("verify", artefact).code == 0


def test_a_miss_says_which_by_how_much_and_what_would_help(
    halfbyte: Halfbyte, stories260k: Path, artefact: Path, story: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "strict.toml"
    gate.write_text("[text.story]\nmax_kl_mean = 1e-9\n")
    measure = ("eval", artefact, "--against", stories260k, "--text", f"story={story}")
    outcome = halfbyte(*measure, "--window", 64, "--gate", gate)
    assert outcome.code == 7
    assert "missed: kl_mean on story is " in outcome.err and "beyond 1e-09" in outcome.err
    assert "likely cause: descriptions, texts and weights agree up to rounding" in outcome.err
    assert "what would help: --dtype f32" in outcome.err
    assert manifest(artefact)["measurements"]["gate"]["misses"][0]["text"] == "story"
    again = halfbyte("run", artefact, "Once", "--raw", "--max-tokens", 2)
    assert again.code == 0 and "it missed its gate" in again.err


def test_tasks_beside_a_reference(halfbyte: Halfbyte, shared_data: Path) -> None:
    piqa = shared_data / "eval" / "icl" / "piqa.jsonl"
    tasks = ("--task", f"choices={piqa}", "--task", "answers", "--limit", 2, "--max-tokens", 6)
    document = halfbyte("eval", "demo", "--against", "demo", *tasks, "--json").document
    assert document["texts"] == []
    names = [(task["name"], task["kind"], task["items"]) for task in document["tasks"]]
    assert names == [("piqa", "choices", 2), ("answers", "answers", 2)]
    assert all(task["flips"]["rate"] == 0.0 for task in document["tasks"])
    shown = halfbyte("eval", "demo", *tasks[:2], "--limit", 2)
    assert "piqa: choices, 2 items" in shown.out and "reference" not in shown.out
    for wrong in ("chess", "choices", f"humaneval={piqa}"):
        assert halfbyte("eval", "demo", "--task", wrong).code == 2


def test_what_holds_its_source_as_it_was_needs_no_gate(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path
) -> None:
    path = tmp_path / "same.gguf"
    halfbyte("export", stories260k, "--to", "gguf", "-o", path)
    for model in (path, stories260k):
        assert "measured" not in halfbyte("run", model, "Once", "--raw", "--max-tokens", 1).err


def test_compare_sets_models_side_by_side(
    halfbyte: Halfbyte, stories260k: Path, artefact: Path, story: Path
) -> None:
    reading = ("--text", story, "--window", 64, "--max-windows", 2)
    run = ("compare", stories260k, artefact, *reading, "--rounds", 1, "--threads", 1)
    before, after = halfbyte(*run, "--json").document["models"]
    assert before["texts"] == [] and after["texts"][0]["kl"]["mean"] > 0
    assert before["stored_bytes"] > after["stored_bytes"] > 0
    assert 8 < after["bits_per_weight"] < before["bits_per_weight"]
    for side in (before, after):
        assert side["decode_tokens_per_s"] > 0 and side["peak_bytes"] > 0
    twice = halfbyte("compare", stories260k, stories260k, *reading)
    assert twice.code == 2 and "named twice" in twice.err


def test_the_table_of_a_comparison_lines_up() -> None:
    text = Fidelity(
        name="story",
        tokens=9,
        perplexity=5.5,
        perplexity_error=0.1,
        reference_perplexity=5.0,
        perplexity_ratio=1.1,
        kl=Divergence(mean=0.02, mean_error=0, median=0, p90=0, p99=0.5, p999=0, max=1),
        same_top1=0.875,
    )
    base = Side(
        name="models/base/",
        parameters=8_000_000,
        stored_bytes=16_000_000,
        weights_bytes=20 << 20,
        peak_bytes=30 << 20,
        load_s=0.5,
        token_s=0.004,
        prompt_tokens_per_s=1000.0,
        decode_tokens_per_s=250.0,
        ops="native",
    )
    quant = replace(base, name="q.gguf", stored_bytes=4_500_000, token_s=0.002, texts=[text])
    lines = [*table([base, quant])]
    assert lines[0].split() == ["base", "q.gguf"]
    assert lines[2].split() == ["bits", "per", "weight", "16.00", "4.50"]
    assert lines[6].split() == ["a", "token", "takes", "4.00", "ms", "2.00", "ms", "x0.50"]
    assert lines[10].split() == ["perplexity", "5.000", "5.500", "+10.00%"]
    column = lines[0].index("q.gguf")
    assert all(line[column - 1 : column] in ("", " ") for line in lines)
    assert lines[13].endswith("87.50%")


def test_a_directory_gets_the_proof_too(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path
) -> None:
    """In eight bits this model passes our own gate; in four it is damaged, and kept."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    quantize = ("quantize", stories260k, "--threads", 1, "--json")
    found = halfbyte(*quantize, "-o", good, "--recipe", "q8_0")
    assert found.code == 0 and found.document["passed"]
    names = {path.name for path in good.iterdir()}
    assert names == {"model.gguf", "manifest.json", "report.html", "report.json", "README.md"}
    told = json.loads((good / "report.json").read_text())
    assert told["passed"] and told["recipe"] == "q8_0" and len(told["layers"]) == 5
    assert told["commands"] == [
        "halfbyte quantize stories260K --threads 1 --json -o good --recipe q8_0",
        "halfbyte eval good --against stories260K --gate default",
    ]
    assert json.loads((good / "manifest.json").read_text())["measurements"]["gate"]["passed"]
    assert "measured" not in halfbyte("run", good, "Once", "--raw", "--max-tokens", 1).err
    missed = halfbyte(*quantize, "-o", bad)
    assert missed.code == 7 and not missed.document["passed"] and "missed: " in missed.err
    assert (bad / "model.gguf").exists() and "Missed its gate." in (bad / "report.html").read_text()
    points = json.loads((bad / "report.json").read_text())["points"]
    assert [point["name"] for point in points] == ["stories260K", "good", "bad"]
    plain = tmp_path / "plain"
    assert halfbyte(*quantize, "-o", plain, "--no-report").document["report"] is None
    assert {path.name for path in plain.iterdir()} == {"model.gguf", "manifest.json"}


def test_a_report_of_what_eval_measured(
    halfbyte: Halfbyte, stories260k: Path, artefact: Path, story: Path, tmp_path: Path
) -> None:
    measure = ("eval", artefact, "--text", story, "--window", 64, "--report", tmp_path / "report")
    assert halfbyte(*measure, "--against", stories260k).code == 0
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert told["passed"] is None and told["texts"][0]["name"] == "story.txt"
    assert told["commands"][0].startswith("halfbyte quantize stories260K -o stories.gguf")
    assert told["commands"][1].startswith("halfbyte eval stories.gguf --text story.txt --window 64")
    assert str(tmp_path) not in "".join(told["commands"])
    alone = halfbyte(*measure)
    assert alone.code == 2 and "beside its reference" in alone.err
