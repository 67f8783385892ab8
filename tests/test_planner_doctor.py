"""The doctor finds each planted fault, and nothing in what is healthy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from planted import (
    MACHINE,
    MACHINE_FAULTS,
    MODEL,
    MODEL_FAULTS,
    PAGE,
    Planted,
    page,
    said_by,
    spec,
)
from published import PUBLISHED

from halfbyte.kernels.cpu.ops import INSTRUCTION_SETS
from halfbyte.planner.doctor import installation, machine, model
from halfbyte.planner.doctor.facts import Graphics, MachineFacts, Memory, Native, Processor
from halfbyte.planner.doctor.finding import Said, examine, name_of, ok, worst

GROUPS = {
    "machine": (machine.CHECKS, MACHINE_FAULTS, MACHINE),
    "model": (model.CHECKS, MODEL_FAULTS, MODEL),
}


def planted() -> Iterator[Any]:
    for group, (_, faults, _) in GROUPS.items():
        for name, found in faults.items():
            for it in found:
                yield pytest.param(group, name, it, id=f"{name}: {it.says[:40]}")


@pytest.mark.parametrize(("group", "name", "fault"), list(planted()))
def test_the_planted_fault_is_found(group: str, name: str, fault: Planted) -> None:
    checks, _, _ = GROUPS[group]
    told = said_by(name, fault.facts, checks)
    found = [it for it in told if fault.says in it.finding]
    assert [it.severity for it in found] == [fault.severity], told
    assert fault.severity == "ok" or found[0].fix


@pytest.mark.parametrize("group", GROUPS)
def test_every_check_has_a_planted_fault(group: str) -> None:
    checks, faults, _ = GROUPS[group]
    assert [name_of(check) for check in checks] == list(faults)
    graver = {name for name, found in faults.items() if any(it.severity != "ok" for it in found)}
    assert graver == faults.keys()


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_is_found_in_what_is_healthy(group: str) -> None:
    checks, _, healthy = GROUPS[group]
    findings = examine(healthy, checks)
    assert {it.severity for it in findings} == {"ok"}, [it for it in findings if it.fix]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_published_rope(name: str) -> None:
    told = said_by("rope", replace(MODEL, spec=spec(name)), model.CHECKS)
    assert [it.severity for it in told] == ["ok"]


def test_little_is_known_and_nothing_is_invented() -> None:
    """A machine that tells nothing about cards, memory speed or packages has no such faults."""
    facts = MachineFacts(
        python="3.12.0",
        system="Linux",
        processor=Processor(name="a processor", flags=frozenset({"avx2", "fma", "f16c"})),
        memory=Memory(total=2**35, available=2**34),
        native=Native(refusal=None, runs=("avx2",)),
        graphics=Graphics(),
    )
    assert {it.severity for it in examine(facts, machine.CHECKS)} == {"ok", "note"}


def test_checks_say_what_they_look_for() -> None:
    for checks, _, _ in GROUPS.values():
        assert all((check.__doc__ or "").strip() for check in checks)


def test_every_instruction_set_says_what_it_needs() -> None:
    assert tuple(installation.NEEDS) == INSTRUCTION_SETS


def test_a_check_that_fails_stops_no_other() -> None:
    def broken(_: MachineFacts) -> Iterator[Said]:
        """Nothing."""
        yield ok("so far")
        raise KeyError("x")

    findings = examine(MACHINE, (broken, installation.python_version))
    assert [it.severity for it in findings] == ["warning", "ok"]
    assert "KeyError" in findings[0].finding and worst(findings) == "warning"
    assert worst([]) == "ok"


def test_the_page_is_what_the_checks_say() -> None:
    """`PYTHONPATH=src:tests python -m planted` writes the tables anew."""
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text
