"""Functions to be written from their docstring, in the manner of HumanEval; tests decide.

Lines of JSON (gzipped or not) with `prompt`, `entry_point` and `test`, which defines `check`. What
a model writes is run, so this needs leave: `Settings.allow_code` (confined.py says what is limited
and what is not). Source: "Evaluating large language models trained on code" (arXiv 2107.03374).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals.tasks.confined import passes
from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.formats.lines import Line, read_lines

ASKED = "Complete this Python function. Answer with the whole function in one code block."
BLOCK = re.compile(r"```(?:python|py)?[^\S\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
# Where text that continues a function has left it.
END = re.compile(r"\n(?=[^\s)\]}])")


@dataclass(frozen=True, slots=True)
class Problem:
    """A function's beginning, its name, and a program that defines `check(function)`."""

    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True, slots=True)
class Functions:
    """Problems, and how long an answer may be."""

    items: Sequence[Problem]
    max_tokens: int

    def run(self, subject: Subject, _theirs: Sequence[Outcome] | None) -> list[Outcome]:
        asked = [_asked(problem, subject.has_template) for problem in self.items]
        prompts = [subject.prompt(question) for question in asked]
        completions = subject.complete(prompts, self.max_tokens)
        answers = [subject.text(c, p) for c, p in zip(completions, prompts, strict=True)]
        return [judge(problem, text) for problem, text in zip(self.items, answers, strict=True)]


def judge(problem: Problem, answer: str) -> Outcome:
    """Runs the function that an answer holds against its tests."""
    code = program(problem, answer)
    whole = f"{code}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"
    return Outcome(right=passes(whole), answer=code)


def program(problem: Problem, answer: str) -> str:
    """The function: in a block of code, bare, or as what continues the prompt."""
    block = BLOCK.search(answer)
    code = block[1] if block else answer
    header = f"def {problem.entry_point}"
    if header in code:
        return problem.prompt.rpartition(header)[0] + code
    return problem.prompt + END.split(code, maxsplit=1)[0]


def read_functions(path: Path, settings: Settings) -> Functions:
    """The problems of a file; refused unless programs may be run."""
    if not settings.allow_code:
        raise InvalidInputError(
            "this task runs programs that a model writes, with the rights of this user",
            where=path,
            hint="--allow-code, best in a container",
        )
    lines = read_lines(path, settings.limit)
    return Functions([_problem(line) for line in lines], settings.max_tokens)


def _problem(line: Line) -> Problem:
    return Problem(line.text("prompt"), line.text("entry_point"), line.text("test"))


def _asked(problem: Problem, has_template: bool) -> str:
    if not has_template:
        return problem.prompt
    return f"{ASKED}\n\n```python\n{problem.prompt.rstrip()}\n```"
