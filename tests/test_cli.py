"""Contracts: the verbs end to end, their documents, their exit codes, and what they say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commandline import Halfbyte

from halfbyte.cli import VERBS
from halfbyte.cli.inspect import conversions
from halfbyte.formats.reference import demo_path
from halfbyte.kernels.cpu import instruction_set


def test_help_lists_every_verb(halfbyte: Halfbyte) -> None:
    outcome = halfbyte("--help")
    assert outcome.code == 0
    assert all(f"  {verb} " in outcome.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(halfbyte: Halfbyte, verb: str) -> None:
    outcome = halfbyte(verb, "--help")
    assert outcome.code == 0 and f"Usage: halfbyte {verb}" in outcome.out


def test_inspect_gives_one_document(halfbyte: Halfbyte, tiny_gemma4: Path) -> None:
    facts = halfbyte("inspect", tiny_gemma4, "--json").document
    assert facts["schema"] == "halfbyte.inspect/1"
    assert facts["parameters"] == sum(_count(tensor["shape"]) for tensor in facts["tensors"])
    assert facts["stop_ids"] == [1, 50, 106]
    assert {tensor["scheme"] for tensor in facts["tensors"]} == {"bf16"}
    assert len(facts["unused"]) == 11
    assert facts["spec"]["layers"][5]["attention"]["shares_kv"] is True


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_inspect_shows_a_page(halfbyte: Halfbyte, stories260k: Path) -> None:
    page = halfbyte("inspect", stories260k, "--tensors").out
    assert "260,032" in page and "layers.4.mlp.down.weight" in page


def test_inspect_says_what_is_converted_at_load() -> None:
    if instruction_set() is None:
        pytest.skip("the native kernels are not built for this machine")
    assert conversions({"q4_0", "q6_k", "bf16"}) == []
    assert conversions({"q5_0", "q4_1", "q4_0"}) == [
        "f32 on this CPU where q4_1, exactly",
        "q8_0 on this CPU where q5_0, exactly",
    ]


def test_the_demo_answers(halfbyte: Halfbyte) -> None:
    arguments = ("run", "demo", "What is water?", "--seed", 3, "--max-tokens", 12, "--json")
    first = halfbyte(*arguments).document
    assert first["schema"] == "halfbyte.run/1" and first["finish_reason"] in ("stop", "length")
    assert first["stats"]["output_tokens"] == len(first["token_ids"]) <= 12
    assert first["stats"]["memory"]["planned_bytes"] > 0
    assert halfbyte(*arguments).document["token_ids"] == first["token_ids"]


def test_text_goes_to_stdout_and_talk_to_stderr(halfbyte: Halfbyte, stories260k: Path) -> None:
    outcome = halfbyte(
        "run", stories260k, "--raw", "--temperature", 0, "--max-tokens", 8, "--stats",
        stdin="Once upon a time",
    )  # fmt: skip
    assert outcome.out == ", there was a little girl\n"
    assert "tokens/s" in outcome.err and "tokens/s" not in outcome.out


def test_quantize_run_verify_export(halfbyte: Halfbyte, stories260k: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    made = halfbyte("quantize", stories260k, "-o", target, "--method", "rtn", "--json").document
    assert made["bytes"] == target.stat().st_size < made["source_bytes"]
    assert halfbyte("verify", target).code == 0
    ask = ("--raw", "Once upon a time", "--temperature", 0, "--max-tokens", 40, "--json")
    from_file = halfbyte("run", target, *ask).document
    on_the_way = halfbyte("run", stories260k, *ask, "--recipe", "q4_0", "--method", "rtn").document
    assert from_file["token_ids"] == on_the_way["token_ids"]
    again = tmp_path / "again"
    assert halfbyte("export", target, "--to", "gguf", "-o", again).code == 0
    assert halfbyte("verify", again).code == 0
    assert halfbyte("run", again, *ask).document["token_ids"] == from_file["token_ids"]


def test_a_changed_byte_is_found(halfbyte: Halfbyte, stories260k: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.gguf"
    halfbyte("quantize", stories260k, "-o", target)
    data = bytearray(target.read_bytes())
    data[-100] ^= 1
    target.write_bytes(data)
    outcome = halfbyte("verify", target)
    assert outcome.code == 4 and "sha256" in outcome.err
    target.write_bytes(data[:-50])
    assert halfbyte("run", target, "hello").code == 4


def test_a_chat_keeps_its_history(
    halfbyte: Halfbyte, monkeypatch: pytest.MonkeyPatch, tiny_gemma4: Path
) -> None:
    lines = iter(["/?", "/system Be brief.", "Name a colour.", "/retry", "/nonsense", "Another?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or _end())
    monkeypatch.setattr("halfbyte.cli.run._at_terminal", lambda: True)
    outcome = halfbyte("run", demo_path(), "--max-tokens", 5, "--temperature", 0, "--stats")
    assert outcome.code == 0
    assert "/retry" in outcome.err and "unknown command /nonsense" in outcome.err
    prompts = [int(line.split()[2]) for line in outcome.err.splitlines() if line[:3] == "-- "]
    assert len(prompts) == 3 and prompts[0] == prompts[1] < prompts[2]


def _end() -> str:
    raise EOFError


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("nonsense",), 2, "No such command"),
        (("run", "demo", "hi", "--temperature", "-1"), 2, "temperature is -1"),
        (("run", "demo", "hi", "--top-p", "1.5"), 2, "top_p is 1.5"),
        (("run", "demo", "hi", "--context", "0"), 2, "no length"),
        (("run", "demo", "hi", "--context", "1m"), 2, "beyond the model's 4096"),
        (("run", "demo", "hi " * 300, "--context", "64"), 2, "--context"),
        (("run", "demo", "hi", "--device", "tpu"), 2, "unknown device"),
        (("run", "demo", "hi", "--recipe", "q4_0-pure"), 2, "would damage it"),
        (("run", "/nowhere/model.gguf", "hi"), 2, "hub"),
        (("quantize", "demo", "-o", "x.gguf", "--recipe", "q8_0"), 2, "would damage it"),
        (("inspect", "/nowhere"), 2, "hub"),
    ],
)
def test_mistakes_are_told_in_a_line_or_two(
    halfbyte: Halfbyte, arguments: tuple[object, ...], code: int, says: str
) -> None:
    outcome = halfbyte(*arguments)
    assert outcome.code == code and says in outcome.err, outcome.err
    assert "Traceback" not in outcome.err and outcome.out == ""


def test_an_empty_prompt_needs_a_model_with_a_beginning(
    halfbyte: Halfbyte, stories260k: Path
) -> None:
    outcome = halfbyte("run", stories260k, "--raw", "", "--temperature", 0, "--max-tokens", 4)
    assert outcome.code == 0 and outcome.out.strip()


def test_a_model_without_a_template_says_raw(halfbyte: Halfbyte, stories260k: Path) -> None:
    outcome = halfbyte("run", stories260k, "hello")
    assert outcome.code == 1 and "--raw" in outcome.err


def test_a_template_of_ones_own(halfbyte: Halfbyte, stories260k: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }} upon")
    ask = ("--temperature", 0, "--max-tokens", 8, "--json")
    ours = halfbyte("run", stories260k, "Once", "--template", template, *ask)
    raw = halfbyte("run", stories260k, "Once upon", "--raw", *ask)
    assert ours.document["token_ids"] == raw.document["token_ids"]
    assert ours.document["calls"] == []
    thinking = halfbyte("run", stories260k, "Once", "--template", template, "--think", *ask)
    assert thinking.code == 0 and "no switch for thinking" in thinking.err


def test_an_unwritable_target_loses_nothing(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path
) -> None:
    outcome = halfbyte("quantize", stories260k, "-o", tmp_path / "none" / "x.gguf")
    assert outcome.code == 2 and "cannot be written" in outcome.err
    copy = tmp_path / "copy"
    shutil.copytree(stories260k, copy)
    (copy / "model.safetensors").write_bytes(b"short")
    assert halfbyte("quantize", copy, "-o", tmp_path / "x.gguf").code == 4
    assert not (tmp_path / "x.gguf").exists()


def test_ctrl_c_leaves_the_target_untouched(
    halfbyte: Halfbyte, monkeypatch: pytest.MonkeyPatch, stories260k: Path, tmp_path: Path
) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"before")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.quantizer.pipeline.convert", interrupt)
    outcome = halfbyte("quantize", stories260k, "-o", target)
    assert outcome.code == 130 and target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_eval_measures_and_gates(halfbyte: Halfbyte, stories260k: Path, tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little dog. He liked to play. " * 40)
    gate = tmp_path / "gate.toml"
    gate.write_text("max_kl_mean = 1e-9\n")
    arguments = ("eval", stories260k, "--against", stories260k, "--text", text, "--window", 64)
    same = halfbyte(*arguments, "--dtype", "f32", "--kv", "f32", "--json").document
    assert same["texts"][0]["kl"]["mean"] < 1e-9 and same["texts"][0]["same_top1"] == 1.0
    outcome = halfbyte(*arguments, "--recipe", "q4_0", "--gate", gate)
    assert outcome.code == 7 and "missed: kl_mean" in outcome.err
    assert "perplexity" in outcome.out


def test_the_default_gate_names_what_is_wrong(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path
) -> None:
    """A rope base of 1e6 in the config of a copy; the same with nothing to compare."""
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a little dog. He liked to play. " * 40)
    bad = tmp_path / "bad"
    shutil.copytree(stories260k, bad)
    config = bad / "config.json"
    config.chmod(0o644)
    config.write_text(config.read_text().replace("10000.0", "1000000.0"))
    measure = ("--text", text, "--window", 64, "--gate", "default")
    outcome = halfbyte("eval", bad, "--against", stories260k, *measure)
    assert outcome.code == 7 and "missed: kl_mean" in outcome.err
    assert "likely cause: all full layers: rope base is 1e+06" in outcome.err
    document = halfbyte("eval", stories260k, "--against", stories260k, *measure, "--json").document
    assert document["gate"]["passed"] and not document["gate"]["misses"]
    assert document["texts"][0]["kl_by_position"]["beyond_window"] is None
    alone = halfbyte("eval", stories260k, *measure)
    assert alone.code == 2 and "needs a reference" in alone.err
    told = halfbyte("eval", bad, "--against", stories260k, *measure[:4])
    assert told.code == 0 and "differs: all full layers: rope base" in told.err


def test_debug_shows_the_traceback(halfbyte: Halfbyte) -> None:
    assert "Traceback" in halfbyte("run", "demo", "hi", "--device", "tpu", "--debug").err
