"""What processes take now: a sample of one, of all that halfbyte runs, and a monitor of one's own.

    with halfbyte.Monitor(csv="memory.csv") as monitor:
        ...
    print(monitor.summary())

The monitor is a thread that looks every so often. Its peak is exact all the same: between two looks
the kernel remembers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from csv import writer
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, time
from typing import Self

from halfbyte.errors import InvalidInputError
from halfbyte.planner import probe_card
from halfbyte.planner.probe_system import process_memory, process_name
from halfbyte.planner.running import Running, running

INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A process at a moment (seconds since 1970). Bytes: resident now, the most that ever were, and
    on cards (None where the driver does not tell); of all cards, what is used and what there is.

    `planned_bytes` and `before_bytes` are those of the models that it announced, 0 for none.
    """

    time: float
    pid: int
    name: str
    planned_bytes: int
    before_bytes: int
    resident_bytes: int
    peak_bytes: int
    card_bytes: int | None
    cards_used_bytes: int
    cards_bytes: int

    @property
    def measured_bytes(self) -> int:
        """What to hold against the plan: without what was resident before the model."""
        on_cards = self.card_bytes or 0
        return max(0, self.resident_bytes - self.before_bytes) + on_cards


COLUMNS = (*Sample.__dataclass_fields__, "measured_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a monitor saw. `peak_bytes`: the most that were resident while it looked."""

    seconds: float
    samples: int
    resident_bytes: int
    peak_bytes: int
    card_peak_bytes: int


def sample(pid: int | None = None) -> Sample:
    """A process now, by default this one. Raises `InvalidInputError` for one that is not there."""
    pid = os.getpid() if pid is None else pid
    found = samples([pid])
    if not found:
        raise InvalidInputError(f"there is no process {pid}", hint="halfbyte top lists its own")
    return found[0]


def samples(pids: Sequence[int]) -> list[Sample]:
    """These processes now, without those that are gone."""
    cards = probe_card.read().cards
    announced = running()
    now = time()
    return [
        Sample(
            time=now,
            pid=pid,
            name=_name(pid, announced),
            planned_bytes=sum(it.planned_bytes for it in announced if it.pid == pid),
            before_bytes=min((it.before_bytes for it in announced if it.pid == pid), default=0),
            resident_bytes=memory[0],
            peak_bytes=memory[1],
            card_bytes=probe_card.card_bytes(pid, cards),
            cards_used_bytes=sum(card.used for card in cards),
            cards_bytes=sum(card.memory for card in cards),
        )
        for pid in pids
        if (memory := process_memory(pid)) is not None
    ]


def _name(pid: int, announced: Sequence[Running]) -> str:
    models = [it.model for it in announced if it.pid == pid]
    return " + ".join(models) or process_name(pid)


class Table:
    """Samples as a CSV file, a line each, readable while it grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = writer(self._file, lineterminator="\n")
        self._line(COLUMNS)

    def add(self, it: Sample) -> None:
        values = {**asdict(it), "measured_bytes": it.measured_bytes}
        self._line([values[name] for name in COLUMNS])

    def close(self) -> None:
        self._file.close()

    def _line(self, cells: Sequence[object]) -> None:
        self._writer.writerow(cells)
        self._file.flush()


class Monitor:
    """Looks at this process every `interval` seconds, in a thread, until it is stopped.

    `csv`: a file for the samples, written anew. What went wrong in the thread (a full disk) is
    raised by `stop`. It can be started once.
    """

    def __init__(self, *, interval: float = INTERVAL_S, csv: str | Path | None = None) -> None:
        if interval <= 0:
            raise InvalidInputError(f"the interval is {interval:g}", hint="seconds, above 0")
        self._interval = interval
        self._table = None if csv is None else Table(Path(csv))
        self._over = Event()
        self._thread = Thread(target=self._watch, name="halfbyte-monitor", daemon=True)
        self._error: Exception | None = None
        self._began = monotonic()
        self._first = self._last = sample()
        self._count = 0
        self._most = 0
        self._most_on_cards = 0

    def start(self) -> Self:
        self._began = monotonic()
        self._first = sample()
        self._thread.start()
        return self

    def stop(self) -> Summary:
        """Ends it, after a last look."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._table is not None:
            self._table.close()
        if self._error is not None:
            raise self._error
        return self.summary()

    def summary(self) -> Summary:
        """What was seen so far."""
        last = self._last
        rose = last.peak_bytes if last.peak_bytes > self._first.peak_bytes else 0
        return Summary(
            seconds=monotonic() - self._began,
            samples=self._count,
            resident_bytes=last.resident_bytes,
            peak_bytes=max(self._most, rose),
            card_peak_bytes=self._most_on_cards,
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        try:
            while not self._over.is_set():
                self._look()
                self._over.wait(self._interval)
            self._look()
        except Exception as error:  # told by `stop`: nobody reads what a thread raises
            self._error = error

    def _look(self) -> None:
        self._last = sample()
        self._count += 1
        self._most = max(self._most, self._last.resident_bytes)
        self._most_on_cards = max(self._most_on_cards, self._last.card_bytes or 0)
        if self._table is not None:
            self._table.add(self._last)
