"""Word problems with a number for an answer, in the manner of GSM8K.

Lines of JSON with `question` and `answer`, which ends in "#### 18". An answer is right if the
number behind its last "####", or else the last number in it, equals that one. Source: "Training
verifiers to solve math word problems" (arXiv 2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.formats.lines import Line, read_lines

MARK = "####"
ASKED = "\nWork it out step by step. End with '#### ' and the answer as a number."
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True, slots=True)
class WordProblems:
    """Questions and the numbers that answer them."""

    items: Sequence[tuple[str, Fraction]]
    max_tokens: int

    def run(self, subject: Subject, _theirs: Sequence[Outcome] | None) -> list[Outcome]:
        asked = [_asked(question, subject.has_template) for question, _ in self.items]
        prompts = [subject.prompt(question) for question in asked]
        completions = subject.complete(prompts, self.max_tokens)
        answers = [subject.text(c, p) for c, p in zip(completions, prompts, strict=True)]
        return [
            judge(answer if subject.has_template else answer.partition("\nQuestion:")[0], number)
            for answer, (_, number) in zip(answers, self.items, strict=True)
        ]


def judge(answer: str, expected: Fraction) -> Outcome:
    """An answer against the right number. `answered`: whether it has a number at all."""
    found = number_in(answer)
    shown = "" if found is None else str(found)
    return Outcome(
        right=found == expected, answer=shown, numbers={"answered": float(found is not None)}
    )


def number_in(answer: str) -> Fraction | None:
    """The number that an answer ends in."""
    _, mark, marked = answer.rpartition(MARK)
    found = NUMBER.search(marked) if mark else None
    last = found[0] if found else next(reversed(NUMBER.findall(answer)), None)
    return None if last is None else _value(last)


def _value(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):
        return None


def read_problems(path: Path, settings: Settings) -> WordProblems:
    """The problems of a file."""
    items = [_problem(line) for line in read_lines(path, settings.limit)]
    return WordProblems(items, settings.max_tokens)


def _problem(line: Line) -> tuple[str, Fraction]:
    _, mark, answer = line.text("answer").rpartition(MARK)
    number = number_in(answer) if mark else None
    if number is None:
        raise line.wrong(f"the answer does not end in '{MARK}' and a number")
    return line.text("question"), number


def _asked(question: str, has_template: bool) -> str:
    return question + ASKED if has_template else f"Question: {question}\nAnswer:"
