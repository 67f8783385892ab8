"""What a machine measured of itself: used and named by later plans, kept apart, never trusted."""

from __future__ import annotations

import json
from collections.abc import Generator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from commandline import Halfbyte

from halfbyte.formats.checkpoint import Pieces, read
from halfbyte.formats.reference import demo_path
from halfbyte.kernels.cpu import instruction_set
from halfbyte.planner.calibration import (
    DEFAULT,
    EMPTY,
    LATEST,
    MIB,
    measurement,
    place,
    read_store,
    remember,
    text_bytes,
)

native = pytest.mark.skipif(instruction_set() is None, reason="no native kernels here")
DAY = date(2026, 2, 3)


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    yield


def keep(
    process: int | None, *, text: int | None = None, ops: str = "ops", rate: float = 3e10
) -> None:
    found = measurement(vocab=1000, text_bytes=text, process_bytes=process, bandwidth=rate, day=DAY)
    remember("a machine", ops, found)


def test_a_plan_takes_the_median_of_what_was_measured() -> None:
    assert read_store() is EMPTY
    assert EMPTY.of("a machine", "ops") is DEFAULT
    for process in (1 * MIB, 90 * MIB, 2 * MIB):
        keep(process, text=900_000)
    found = read_store().of("a machine", "ops")
    assert found.process_bytes == 2 * MIB
    assert found.bandwidth == 3e10
    assert found.source == "measured on this machine, 2026-02-03"
    assert found.text(Pieces(1000)) == (900_000, f"; {found.source}")
    large = Pieces(2000)  # of which a small one says nothing
    assert found.text(large) == (text_bytes(large), "")


def test_a_tokenizer_is_as_large_as_its_header_says() -> None:
    known = read(demo_path()).pieces
    assert known == Pieces(8192, 7608, parsed=True)
    assert text_bytes(Pieces(8192, 0, parsed=True)) < text_bytes(known)
    # One of scores has two merges for every piece; a JSON document leaves something behind.
    assert text_bytes(Pieces(8192, parsed=True)) == text_bytes(Pieces(8192, 2 * 8192, parsed=True))
    assert text_bytes(Pieces(8192)) > text_bytes(known)


def test_machines_and_op_sets_are_kept_apart() -> None:
    keep(1 * MIB)
    store = read_store()
    assert store.of("another machine", "ops") is DEFAULT
    assert store.of("a machine", "other ops") is DEFAULT


def test_the_latest_are_kept() -> None:
    for number in range(LATEST + 5):
        keep(number)
    (entry,) = read_store().entries.values()
    assert [one.process_bytes for one in entry] == [*range(5, LATEST + 5)]


def test_what_cannot_be_true_is_not_kept() -> None:
    keep(2**40, rate=1.0)
    (entry,) = read_store().entries.values()
    assert (entry[0].process_bytes, entry[0].bandwidth) == (None, None)


GOOD: dict[str, Any] = {
    "vocab": 1, "text_bytes": None, "process_bytes": 5, "bandwidth": None, "date": "2026-01-01",
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"schema": "other/1", "entries": {}}',
        '{"schema": "halfbyte.calibration/1"}',
        *(
            json.dumps({"schema": "halfbyte.calibration/1", "entries": {"a": [{**GOOD, **wrong}]}})
            for wrong in (
                {"process_bytes": -1},
                {"process_bytes": "many"},
                {"bandwidth": 5},
                {"date": "today"},
                {"knob": 1},
            )
        ),
        "\x00" * 100,
    ],
)
def test_a_damaged_file_is_left_aside_with_a_word(halfbyte: Halfbyte, text: str) -> None:
    place().parent.mkdir(parents=True)
    place().write_text(text)
    store = read_store()
    assert not store.entries
    assert "left aside" in (store.complaint or "")
    told = halfbyte("plan", "demo", "--budget", "1GiB", "--json")
    assert told.code == 0
    assert "left aside" in told.err
    assert not halfbyte("plan", "demo", "--budget", "1GiB", "--no-calibration").err
    keep(1 * MIB)
    assert read_store().of("a machine", "ops").process_bytes == MIB


@native
def test_fill_measures_and_plans_name_it(halfbyte: Halfbyte) -> None:
    before = halfbyte("plan", "demo", "--budget", "1GiB", "--json").document
    assert before["tokens_per_s"] is None
    assert halfbyte("fill", "demo", "--context", 256).code in (0, 3)
    after = halfbyte("plan", "demo", "--budget", "1GiB", "--json").document
    notes = {row["component"]: row["note"] for row in after["rows"]}
    assert "measured on this machine" in notes["runtime.process"]
    assert after["tokens_per_s"][0] > after["tokens_per_s"][1] > 0
    without = halfbyte("plan", "demo", "--budget", "1GiB", "--json", "--no-calibration").document
    assert without == before
