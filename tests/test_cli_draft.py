"""`run` with drafters: the same tokens with any, found beside the model or named, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from commandline import Halfbyte
from oracle import MemorySource
from random_drafters import random_drafter

from halfbyte.formats.checkpoint import read, write_gguf
from halfbyte.formats.fingerprint import fingerprint
from halfbyte.quantizer.pipeline import Quantized
from halfbyte.specs import ModelSpec, recipe_of

PROMPT = "Once upon a time, there was a little girl named Lily. Lily and Lily and"
ARGUMENTS = (PROMPT, "--raw", "--max-tokens", 60, "--seed", 1)


@pytest.fixture
def model(stories260k: Path, tmp_path: Path) -> Path:
    """A four-bit GGUF in a folder of its own."""
    write_gguf(Quantized(read(stories260k), recipe_of("q4_0")), tmp_path / "stories.gguf")
    return tmp_path / "stories.gguf"


def drafter_of(spec: ModelSpec, **options: Any) -> MemorySource:
    return random_drafter(spec, recipe="q4_0", **options)


def told(halfbyte: Halfbyte, model: Path, *options: object) -> dict[str, Any]:
    outcome = halfbyte("run", model, *ARGUMENTS, *options, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.document


def drafter_bytes(halfbyte: Halfbyte, model: Path, *options: object) -> int:
    return told(halfbyte, model, *options)["stats"]["memory"]["drafter_bytes"]


def test_every_way_to_draft_says_the_same(halfbyte: Halfbyte, model: Path) -> None:
    drafter = model.parent / "elsewhere.gguf"
    write_gguf(drafter_of(read(model).spec), drafter)
    plain = told(halfbyte, model, "--draft", "off")
    assert plain["stats"]["draft"] is None
    for options in ((), ("--draft", 3), ("--draft", 3, "--drafter", drafter)):
        drafted = told(halfbyte, model, *options)
        assert drafted["token_ids"] == plain["token_ids"]
        stats = drafted["stats"]["draft"]
        assert stats["rounds"] + stats["plain_rounds"] + stats["accepted"] == 59
    assert stats["rounds"] > 20 and drafted["stats"]["memory"]["drafter_bytes"] > 0
    assert stats["tokens_per_round"] == 1 + stats["accepted"] / stats["rounds"]
    assert len(stats["accepted_by_position"]) == 3
    assert stats["draft_s"] > 0 and stats["verify_s"] > 0


def test_the_line_for_a_person_tells_of_drafts(halfbyte: Halfbyte, model: Path) -> None:
    write_gguf(drafter_of(read(model).spec), model.parent / "drafter.gguf")
    err = halfbyte("run", model, *ARGUMENTS, "--stats", "--draft", 4).err
    assert "tokens a round (" in err and "x plain decoding" in err and ", drafter " in err
    err = halfbyte("run", model, *ARGUMENTS, "--stats", "--draft", "off").err
    assert "tokens a round" not in err and ", drafter " not in err


@pytest.mark.parametrize("name", ["stories.drafter.gguf", "drafter.gguf", "mtp-stories.gguf"])
def test_a_drafter_beside_the_model_is_found(halfbyte: Halfbyte, model: Path, name: str) -> None:
    assert drafter_bytes(halfbyte, model) == 0
    write_gguf(drafter_of(read(model).spec), model.parent / name)
    assert drafter_bytes(halfbyte, model) > 0
    assert drafter_bytes(halfbyte, model.parent) > 0


def test_a_drafter_of_another_target(halfbyte: Halfbyte, model: Path) -> None:
    place = model.parent / "drafter.gguf"
    write_gguf(drafter_of(replace(read(model).spec, vocab=100)), place)
    assert drafter_bytes(halfbyte, model) == 0
    err = halfbyte("run", model, *ARGUMENTS).err
    assert "left aside: this is the drafter of another target" in err
    named = halfbyte("run", model, *ARGUMENTS, "--drafter", place)
    assert named.code == 2 and "vocabulary 100, not 512" in named.err


def test_a_drafter_knows_its_target_however_it_is_stored(
    halfbyte: Halfbyte, model: Path, stories260k: Path, tmp_path: Path
) -> None:
    whole, quantized = read(stories260k), read(model)
    mark = fingerprint(whole)
    assert mark == fingerprint(quantized)
    place = tmp_path / "own.gguf"
    write_gguf(drafter_of(quantized.spec, fingerprint=mark), place)
    assert drafter_bytes(halfbyte, model, "--drafter", place) > 0
    write_gguf(drafter_of(quantized.spec, fingerprint="0" * 32), place)
    refused = halfbyte("run", model, *ARGUMENTS, "--drafter", place)
    assert refused.code == 2 and "trained for 00000000" in refused.err


def test_a_recipe_quantizes_the_drafter_too(
    halfbyte: Halfbyte, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    copytree(stories260k, folder)
    spec = read(folder).spec
    write_gguf(random_drafter(spec, hidden=64), folder / "drafter.gguf")
    plain, quantized = (drafter_bytes(halfbyte, folder, *o) for o in ((), ("--recipe", "q8_0")))
    assert quantized < 0.6 * plain
    write_gguf(random_drafter(spec, hidden=64, recipe="q4_0"), folder / "drafter.gguf")
    assert drafter_bytes(halfbyte, folder, "--recipe", "q8_0") < quantized


@pytest.mark.parametrize("value", ["0", "-1", "some"])
def test_a_number_of_drafts_is_a_number(halfbyte: Halfbyte, model: Path, value: str) -> None:
    refused = halfbyte("run", model, *ARGUMENTS, "--draft", value)
    assert refused.code == 2 and "no number of drafts" in refused.err


def test_more_drafts_than_rings_can_take_back_are_refused(halfbyte: Halfbyte, model: Path) -> None:
    refused = halfbyte("run", model, *ARGUMENTS, "--draft", 600)
    assert refused.code == 2 and "rows in a round of drafts" in refused.err


def test_a_drafter_does_not_run_alone(halfbyte: Halfbyte, model: Path) -> None:
    place = model.parent / "own.gguf"
    write_gguf(drafter_of(read(model).spec), place)
    refused = halfbyte("run", place, *ARGUMENTS)
    assert refused.code == 1 and "does not run alone" in refused.err
    page = halfbyte("inspect", place).out
    assert "a target of width 64" in page and "keys and values of the target" in page
