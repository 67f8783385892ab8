"""What a model can do, measured item by item, beside its reference.

Each task is a file: a reader of its items, a pure judge of one answer, and a `run` that asks a
`Subject`. The table says which kinds there are; those with a file of our own need none given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from halfbyte.errors import InvalidInputError
from halfbyte.evals.tasks.answers import read_answers
from halfbyte.evals.tasks.choices import read_choices
from halfbyte.evals.tasks.gsm8k import read_problems
from halfbyte.evals.tasks.humaneval import read_functions
from halfbyte.evals.tasks.needle import read_haystack
from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.evals.tasks.toolcalls import read_offers
from halfbyte.evals.texts import OWN


class Task(Protocol):
    """Items to be asked about. `theirs` are the reference's outcomes, None when it is asked."""

    def run(self, subject: Subject, theirs: Sequence[Outcome] | None, /) -> list[Outcome]: ...


KINDS: dict[str, tuple[Callable[[Path, Settings], Task], str | None]] = {
    "choices": (read_choices, None),
    "gsm8k": (read_problems, None),
    "humaneval": (read_functions, None),
    "needle": (read_haystack, "english.txt"),
    "answers": (read_answers, "chat.jsonl"),
    "tools": (read_offers, "tools.jsonl"),
}


def read_task(kind: str, path: Path | None, settings: Settings) -> Task:
    """The task of a kind on a file, by default our own."""
    if kind not in KINDS:
        raise InvalidInputError(f"no task '{kind}'", hint="there are " + ", ".join(KINDS))
    read, own = KINDS[kind]
    if path is None and own is None:
        raise InvalidInputError(f"the task '{kind}' needs a file", hint=f"--task {kind}=FILE")
    return read(path or OWN / str(own), settings)
