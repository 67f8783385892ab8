"""What can be expected: this model, this recipe, this context, so many tokens a second."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from halfbyte.errors import InvalidInputError
from halfbyte.formats.checkpoint import Checkpoint
from halfbyte.planner.cards import card
from halfbyte.planner.doctor import graphics
from halfbyte.planner.doctor.facts import MachineFacts
from halfbyte.planner.doctor.finding import Finding, name_of
from halfbyte.planner.opening import described
from halfbyte.planner.probe import this_machine
from halfbyte.planner.solve import Goal, solve
from halfbyte.specs import Machine, Plan

OF_CARDS = frozenset(map(name_of, graphics.CHECKS))


def prospect(
    name: str, source: Checkpoint, facts: MachineFacts, findings: Iterable[Finding], goal: Goal
) -> Plan:
    """The best plan of a model on this machine. Raises what `solve` raises."""
    plan, _ = solve(described(name, source, source.pieces), _machine(facts, findings), goal)
    return plan


def _machine(facts: MachineFacts, findings: Iterable[Finding]) -> Machine:
    """The card where nothing keeps it from being used, with its listed speed; else the CPU, with
    the measured one."""
    kept = any(it.severity == "fault" and it.name in OF_CARDS for it in findings)
    if facts.graphics.cards and not kept and facts.torch and facts.torch.cuda:
        found = this_machine("cuda")
        return found if found.bandwidth is not None else replace(found, bandwidth=_listed(found))
    if facts.bandwidth is None:
        return this_machine()
    return replace(this_machine(), bandwidth=facts.bandwidth, measured=True)


def _listed(machine: Machine) -> float | None:
    name = machine.name.replace("NVIDIA", "").replace("GeForce", "")
    try:
        return card(name).bandwidth
    except InvalidInputError:
        return None
