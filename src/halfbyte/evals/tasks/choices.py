"""Multiple choice, without generating anything: which of the choices is the likeliest.

Lines of JSON, of three kinds:

    {"query", "choices", "gold"}                  arc, piqa, boolq: choices behind one question
    {"context_options", "continuation", "gold"}   winogrande: one ending behind several beginnings
    {"context", "continuation"}                   lambada: right if every token is the likeliest

Choices behind one question are compared by log-probability per byte, so that length is no handicap;
an ending behind several beginnings by log-probability. No examples are shown before the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.evals.tasks.likelihood import Ending
from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.formats.lines import Line, read_lines

ANSWER = "\nAnswer: "


@dataclass(frozen=True, slots=True)
class Item:
    """The (beginning, ending) of each choice; `gold` is the right one.

    One choice alone is right when a model would write it.
    """

    options: Sequence[tuple[str, str]]
    gold: int
    per_byte: bool


@dataclass(frozen=True, slots=True)
class Choices:
    """The items of a file."""

    items: Sequence[Item]

    def run(self, subject: Subject, _theirs: Sequence[Outcome] | None) -> list[Outcome]:
        splits = [[subject.split(*option) for option in item.options] for item in self.items]
        longest = max(len(split.ids) for item in splits for split in item)
        likelihood = subject.likelihood(longest)
        return [
            judge(item, [likelihood(split.ids, split.start) for split in options])
            for item, options in zip(self.items, splits, strict=True)
        ]


def judge(item: Item, endings: Sequence[Ending]) -> Outcome:
    """What the likelihoods of an item's choices say. Numbers: how probable the right one is among
    them (`gold`), or the nats per token of an ending that stands alone."""
    if len(endings) == 1:
        right = endings[0].written
        return Outcome(right=right, answer=str(right), numbers={"nats": endings[0].nats})
    sizes = [len(text.encode()) if item.per_byte else 1 for _, text in item.options]
    scores = np.array([e.total / size for e, size in zip(endings, sizes, strict=True)])
    totals = np.array([ending.total for ending in endings])
    weights = np.exp(totals - totals.max())
    chosen = int(scores.argmax())
    gold = float(weights[item.gold] / weights.sum())
    return Outcome(right=chosen == item.gold, answer=str(chosen), numbers={"gold": gold})


def read_choices(path: Path, settings: Settings) -> Choices:
    """The items of a file; `InvalidInputError` names a line that is none."""
    return Choices([_item(line) for line in read_lines(path, settings.limit)])


def _item(line: Line) -> Item:
    if "choices" in line.fields:
        query, texts = line.text("query").rstrip() + ANSWER, _texts(line, "choices")
        return Item([(query, text) for text in texts], _gold(line, texts), True)
    if "context_options" in line.fields:
        ending, texts = " " + line.text("continuation"), _texts(line, "context_options")
        return Item([(text, ending) for text in texts], _gold(line, texts), False)
    return Item([(line.text("context"), " " + line.text("continuation"))], 0, False)


def _texts(line: Line, name: str) -> list[str]:
    found = line.fields[name]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(t, str) for t in found):
        raise line.wrong(f"'{name}' is no list of two texts or more")
    return found


def _gold(line: Line, texts: Sequence[str]) -> int:
    gold = line.fields.get("gold")
    if type(gold) is not int or not 0 <= gold < len(texts):
        raise line.wrong("'gold' is no index of a choice")
    return gold
