"""What was measured on this machine, for later plans: a small file in the cache folder.

`halfbyte fill` writes it: what the tokenizer and a process took beside what was planned exactly,
and how fast memory is read. A plan takes the median of the latest measurements of the same machine,
op set and version, and its rows say so. What it is not: needed. Without it the defaults stand; what
cannot be read is left aside, with a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, cast

from halfbyte import __version__, env
from halfbyte.formats.atomic import write_file
from halfbyte.formats.checkpoint import Pieces

SCHEMA = "halfbyte.calibration/1"
LATEST = 16  # measurements that are kept of one machine and op set
MIB = 2**20
# What a tokenizer takes: its library, each token, each merge. Pieces with scores make two merges
# each; what a JSON document leaves behind is counted by the token.
LIBRARY_BYTES, TOKEN_BYTES, MERGE_BYTES, JSON_BYTES = 2 * MIB, 250, 200, 250
MERGES_OF_SCORES = 2
# Threads, arenas and what the first steps allocate once.
PROCESS_BYTES = 6 * MIB
# Beyond these a measurement was disturbed.
PLAUSIBLE: dict[str, tuple[float, float]] = {
    "vocab": (1, 2**24),
    "text_bytes": (0, 2**34),
    "process_bytes": (0, 256 * MIB),
    "bandwidth": (1e8, 1e14),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Bytes of tokenizers by the size of their vocabulary, those of a process, and bytes read in a
    second. `source` says where they are from, "" for the defaults.
    """

    texts: Mapping[int, int] = field(default_factory=dict[int, int])
    process_bytes: int = PROCESS_BYTES
    bandwidth: float | None = None
    source: str = ""

    @property
    def noted(self) -> str:
        """The source as the end of a row's note."""
        return f"; {self.source}" if self.source else ""

    def text(self, pieces: Pieces) -> tuple[int, str]:
        """Bytes of a tokenizer, and the end of its row's note. A small one says nothing of a large
        one."""
        if pieces.tokens in self.texts:
            return self.texts[pieces.tokens], self.noted
        return text_bytes(pieces), ""


def text_bytes(pieces: Pieces) -> int:
    """Within 5 MiB of what GPT-2's, Qwen 2's, Phi 3's and our own tokenizers took."""
    tokens, merges = pieces.tokens, pieces.merges
    if not pieces.parsed:
        return LIBRARY_BYTES + (TOKEN_BYTES + MERGE_BYTES + JSON_BYTES) * tokens
    merges = MERGES_OF_SCORES * tokens if merges is None else merges
    return LIBRARY_BYTES + TOKEN_BYTES * tokens + MERGE_BYTES * merges


DEFAULT = Calibration()


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One `fill`; None for what it could not tell. `text_bytes` is of a tokenizer of `vocab`."""

    vocab: int
    text_bytes: int | None
    process_bytes: int | None
    bandwidth: float | None
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Measurements by machine, op set and version; `complaint` is why some were left aside."""

    entries: Mapping[str, tuple[Measurement, ...]] = field(
        default_factory=dict[str, tuple[Measurement, ...]]
    )
    complaint: str | None = None

    def of(self, machine: str, ops: str) -> Calibration:
        """The calibration of an op set on a machine; the defaults where nothing was measured."""
        found = self.entries.get(_key(machine, ops), ())
        if not found:
            return DEFAULT
        processes = [one.process_bytes for one in found if one.process_bytes is not None]
        rates = [one.bandwidth for one in found if one.bandwidth is not None]
        texts: dict[int, list[int]] = {}
        for one in found:
            if one.text_bytes is not None:
                texts.setdefault(one.vocab, []).append(one.text_bytes)
        return Calibration(
            texts={vocab: int(median(sizes)) for vocab, sizes in texts.items()},
            process_bytes=int(median(processes)) if processes else PROCESS_BYTES,
            bandwidth=median(rates) if rates else None,
            source=f"measured on this machine, {found[-1].date}",
        )


EMPTY = Store()


def place() -> Path:
    """The file."""
    return env.cache_dir() / "calibration.json"


def read_store() -> Store:
    """What was measured so far. Never fails: what is wrong is in `complaint`."""
    try:
        text = place().read_text(encoding="utf-8")
    except FileNotFoundError:
        return EMPTY
    except (OSError, UnicodeDecodeError) as error:
        return Store(complaint=f"{place()} cannot be read and is left aside: {error}")
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r:.40}")
        entries = {
            str(key): tuple(_measurement(one) for one in found)
            for key, found in document["entries"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Store(complaint=f"{place()} is damaged and left aside: {error}")
    return Store(entries=entries)


def _measurement(values: Any) -> Measurement:
    found = Measurement(**cast("dict[str, Any]", values))
    date.fromisoformat(found.date)
    for name in PLAUSIBLE:
        value = getattr(found, name)
        if value is not None and _plausible(name, value) is None:
            raise ValueError(f"{name} is {value!r:.40}")
    return found


def measurement(
    *,
    vocab: int,
    text_bytes: int | None,
    process_bytes: int | None,
    bandwidth: float | None,
    day: date,
) -> Measurement:
    """A measurement without what cannot be true."""
    return Measurement(
        vocab=vocab,
        text_bytes=_plausible("text_bytes", text_bytes),
        process_bytes=_plausible("process_bytes", process_bytes),
        bandwidth=_plausible("bandwidth", bandwidth),
        date=day.isoformat(),
    )


def _plausible(name: str, value: Any) -> Any:
    least, most = PLAUSIBLE[name]
    return value if isinstance(value, int | float) and least <= value <= most else None


def remember(machine: str, ops: str, found: Measurement) -> None:
    """Adds a measurement to the file; a damaged one is begun anew. `OSError`s pass through."""
    entries = dict(read_store().entries)
    key = _key(machine, ops)
    entries[key] = (*entries.get(key, ()), found)[-LATEST:]
    document = {
        "schema": SCHEMA,
        "entries": {key: [asdict(one) for one in found] for key, found in entries.items()},
    }
    data = json.dumps(document, indent=1).encode()
    place().parent.mkdir(parents=True, exist_ok=True)
    write_file(place(), data)


def _key(machine: str, ops: str) -> str:
    return f"{machine} | {ops} | {__version__}"
