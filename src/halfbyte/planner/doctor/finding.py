"""What a check is, what it finds, and how checks are run.

A check is a pure function over facts. Its name is the function's, the first paragraph of its
docstring says what it looks for (docs/doctor.md is made of these), and it yields what it has to
say; a healthy answer says so, and a check that does not concern this machine is silent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

# fault: it does not work until this is mended. warning: it works, but slower, or not always.
# note: good to know, mostly where other programs read the same files.
Severity = Literal["ok", "note", "warning", "fault"]
SEVERITIES: tuple[Severity, ...] = ("ok", "note", "warning", "fault")


class Said(NamedTuple):
    """What a check says."""

    severity: Severity
    finding: str
    fix: str = ""


Facts = TypeVar("Facts")
Check = Callable[[Facts], Iterator[Said]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the check of this name says; `fix` is empty where all is well."""

    name: str
    severity: Severity
    finding: str
    fix: str = ""


def ok(finding: str) -> Said:
    return Said("ok", finding)


def note(finding: str, fix: str) -> Said:
    return Said("note", finding, fix)


def warning(finding: str, fix: str) -> Said:
    return Said("warning", finding, fix)


def fault(finding: str, fix: str) -> Said:
    return Said("fault", finding, fix)


def name_of(check: Check[Facts]) -> str:
    return check.__name__.replace("_", "-")


def examine(facts: Facts, checks: Sequence[Check[Facts]]) -> list[Finding]:
    """What all the checks say. One that fails says that: the others go on."""
    return [
        Finding(name=name_of(check), severity=said.severity, finding=said.finding, fix=said.fix)
        for check in checks
        for said in _run(check, facts)
    ]


def _run(check: Check[Facts], facts: Facts) -> Iterable[Said]:
    try:
        return list(check(facts))
    except Exception as error:
        text = f"this check failed ({type(error).__name__}: {error})"
        return [warning(text, "please report it, with --bundle")]


def worst(findings: Iterable[Finding]) -> Severity:
    """The gravest severity among them."""
    found: set[Severity] = {it.severity for it in findings}
    return max(found, key=SEVERITIES.index) if found else SEVERITIES[0]
