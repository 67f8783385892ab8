"""A sentence hidden in a long text, asked for at its end: does the model still see it?

Made from any text: for every length (512, 1024, ... tokens) and depth a place and a number are
drawn, "The secret number of Marlow is 48213." goes in at that depth, and behind the text stand the
same words up to the number. Right is a model that thinks this number likelier than seven others
that are nowhere in the text; so a small model, too, gives a signal, and nothing is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.errors import InvalidInputError
from halfbyte.evals.tasks.likelihood import Ending
from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Split, Subject
from halfbyte.formats.documents import content_of
from halfbyte.text.tokenizer import Tokenizer

PLACES = ("Marlow", "Quentin", "Ashford", "Delmont", "Harwick", "Ostend", "Lindale", "Verona")
DEPTHS = tuple((2 * i + 1) / 20 for i in range(10))
SHORTEST = 512
CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence at a depth (0 to 1) of a haystack of `length` tokens; the first number is it."""

    length: int
    depth: float
    place: str
    numbers: Sequence[int]

    @property
    def question(self) -> str:
        return f"The secret number of {self.place} is"


@dataclass(frozen=True, slots=True)
class Haystack:
    """A text, and how much of it to search."""

    text: str
    settings: Settings

    def run(self, subject: Subject, _theirs: Sequence[Outcome] | None) -> list[Outcome]:
        straw = subject.tokenizer.encode(self.text, special=False)
        longest = min(self.settings.longest, subject.context, len(straw))
        needles = [*needles_up_to(longest)][: self.settings.limit]
        if not needles:
            raise InvalidInputError(f"a haystack has at least {SHORTEST} tokens, not {longest}")
        likelihood = subject.likelihood(longest)
        outcomes: list[Outcome] = []
        for needle in needles:
            splits = hidden(needle, straw, subject.tokenizer)
            outcomes.append(judge(needle, [likelihood(s.ids, s.start) for s in splits]))
        return outcomes


def needles_up_to(longest: int) -> Iterator[Needle]:
    """A needle for every length and depth, always the same."""
    length = SHORTEST
    while length <= longest:
        for at, depth in enumerate(DEPTHS):
            random = np.random.default_rng([length, at])
            numbers = random.choice(90_000, CANDIDATES, replace=False) + 10_000
            yield Needle(length, depth, PLACES[at % len(PLACES)], numbers.tolist())
        length *= 2


def hidden(needle: Needle, straw: Sequence[int], tokenizer: Tokenizer) -> list[Split]:
    """The haystack with the needle, asked for, and each candidate as what follows."""
    sentence = f" {needle.question} {needle.numbers[0]}."
    inserted = tokenizer.encode(sentence, special=False)
    asked = tokenizer.encode(f"\n{needle.question}", special=False)
    endings = [tokenizer.encode(f" {number}.", special=False) for number in needle.numbers]
    room = needle.length - len(inserted) - len(asked) - max(map(len, endings)) - 1
    at = _seam(straw, int(needle.depth * room), tokenizer)
    context = tokenizer.with_bos([*straw[:at], *inserted, *straw[at:room], *asked])
    return [Split([*context, *ending], len(context)) for ending in endings]


def _seam(straw: Sequence[int], at: int, tokenizer: Tokenizer) -> int:
    """The nearest place from `at` on backwards where a word begins."""
    spaces = (b" ", b"\n")
    starts = (i for i in range(at, 0, -1) if tokenizer.token_bytes(straw[i]).startswith(spaces))
    return next(starts, 0)


def judge(needle: Needle, endings: Sequence[Ending]) -> Outcome:
    """`written`: the model would have written the number; `nats` per token of it."""
    chosen = int(np.argmax([ending.total for ending in endings]))
    return Outcome(
        right=chosen == 0,
        answer=str(needle.numbers[chosen]),
        numbers={"written": float(endings[0].written), "nats": endings[0].nats},
    )


def read_haystack(path: Path, settings: Settings) -> Haystack:
    """The text of a UTF-8 file."""
    return Haystack(content_of(path), settings)
