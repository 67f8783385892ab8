"""A plan: where every byte goes when a model runs in a certain way, and whether it fits.

A ledger of rows that sums; each row says whether it is arithmetic (from shapes, exact) or
calibrated (measured once, on this machine or on the one where the default was taken). Plans are
values: they are written to a file, edited by hand and read again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from halfbyte.errors import InvalidInputError
from halfbyte.specs.loading import KVType

Basis = Literal["arithmetic", "calibrated"]
Place = Literal["device", "host"]
SCHEMA = "halfbyte.plan/1"
NOT_OURS = ("runtime.other_processes", "runtime.margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one component takes. Components are named `weights.*`, `adapters.*`, `drafter.*`,
    `kv.*`, `activations.*`, `runtime.*`, and of what is left out `vision.*`, `audio.*`; `note` says
    where the number comes from. `place` is where it lies: beside a card there is its host."""

    component: str
    bytes: int
    basis: Basis = "arithmetic"
    note: str = ""
    place: Place = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a model is run. `recipe` None: as it is stored.

    `context` is the positions of one sequence, `prefill_chunk` the rows of prompts in a step,
    `draft` the most tokens drafted in a round (0: none), `drafter` the model that does, if any;
    `adapters` are those that are loaded. Both are named as a person names them. `spare` rings are
    for what is kept of sequences that ended. Where a card is too small, `card_layers` of the last
    layers run on it and the others on the CPU; None: the device has all.
    """

    recipe: str | None
    kv: KVType
    context: int
    sequences: int = 1
    prefill_chunk: int = 512
    draft: int = 0
    drafter: str | None = None
    adapters: tuple[str, ...] = ()
    spare: int = 0
    card_layers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A setup of a model on a machine, its ledger, and what is expected of it.

    `left_out` is what the checkpoint stores and nothing loads: it is in no sum. `budget_bytes` is
    what may be used of the device, `host_budget_bytes` of the host where layers lie there, else 0;
    `tokens_per_s` is bytes read per token over bandwidth, with an empty cache and with a full one.
    """

    model: str
    machine: str
    ops: str
    setup: Setup
    rows: tuple[Row, ...]
    budget_bytes: int
    tokens_per_s: tuple[float, float] | None = None
    left_out: tuple[Row, ...] = ()
    host_budget_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What lies on the device."""
        return sum(row.bytes for row in self.rows if row.place == "device")

    @property
    def host_bytes(self) -> int:
        """What lies on the host beside a card."""
        return sum(row.bytes for row in self.rows if row.place == "host")

    @property
    def own_bytes(self) -> int:
        """What lies anywhere, without what others use and what is left free."""
        every = self.total_bytes + self.host_bytes
        return every - sum(self.part(component) for component in NOT_OURS)

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget_bytes and self.host_bytes <= self.host_budget_bytes

    def part(self, beginning: str) -> int:
        """The bytes of all components whose names begin so."""
        return sum(row.bytes for row in self.rows if row.component.startswith(beginning))

    def document(self) -> dict[str, Any]:
        """Everything as JSON values; `plan_of` reads it back."""
        totals = {
            "fits": self.fits,
            "total_bytes": self.total_bytes,
            "host_bytes": self.host_bytes,
        }
        return {"schema": SCHEMA, **totals, **asdict(self)}


def plan_of(document: Mapping[str, Any]) -> Plan:
    """The plan in a document, also one edited by hand. Raises `InvalidInputError`."""
    if document.get("schema") != SCHEMA:
        raise InvalidInputError(f"no plan: its schema is {document.get('schema')!r}, not {SCHEMA}")
    try:
        values: dict[str, Any] = {"host_budget_bytes": 0, **document}
        known = {field.name: values[field.name] for field in fields(Plan)}
        known["setup"] = _setup_of(document["setup"])
        for rows in ("rows", "left_out"):
            known[rows] = tuple(_row_of(row) for row in document[rows])
        for budget in ("budget_bytes", "host_budget_bytes"):
            _whole(budget, known[budget])
        speed = document["tokens_per_s"]
        known["tokens_per_s"] = None if speed is None else (float(speed[0]), float(speed[1]))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"not a plan: {error}") from error
    return Plan(**known)


def _setup_of(values: Mapping[str, Any]) -> Setup:
    known: dict[str, Any] = {**values, "adapters": tuple(values.get("adapters", ()))}
    setup = Setup(**known)
    if setup.kv not in get_args(KVType):
        raise ValueError(f"kv is {setup.kv!r:.20}; there are {', '.join(get_args(KVType))}")
    for name, least in (("context", 1), ("sequences", 1), ("prefill_chunk", 1), ("draft", 0)):
        _whole(name, getattr(setup, name), least)
    if setup.card_layers is not None:
        _whole("card_layers", setup.card_layers, 1)
    return setup


def _row_of(values: Mapping[str, Any]) -> Row:
    row = Row(**values)
    if row.place not in get_args(Place):
        raise ValueError(f"{row.component}'s place is {row.place!r:.20}")
    _whole(f"{row.component}'s bytes", row.bytes, least=-(2**63))  # a layout may save
    return row


def _whole(name: str, value: object, least: int = 0) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"{name} is {value!r:.40}; it must be a whole number from {least} on")
