"""Answers as a whole: do they end where the reference's end, how long are they, do they repeat?

Lines of JSON with `prompt` or `messages`; a conversation is asked up to its last question. What
damages a model slightly often shows here first: it answers well and does not stop, or goes round
in circles.

Free answers part after the first token that differs, so they tell of rates and lengths only. To
compare the same thing, the model also reads the reference's answer: would it stop where that one
stops (`stops_there`), and nowhere before (`stops_early`)?
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.engine.sequence import Completion
from halfbyte.evals.tasks.likelihood import Likelihood
from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.repetition import loops, repeated
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.formats.conversations import messages_of
from halfbyte.formats.lines import Line, read_lines

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Conversations that wait for an answer of at most `max_tokens`."""

    items: Sequence[Messages]
    max_tokens: int

    def run(self, subject: Subject, theirs: Sequence[Outcome] | None) -> list[Outcome]:
        prompts = [subject.chat.render(messages) for messages in self.items]
        completions = subject.complete(prompts, self.max_tokens)
        outcomes = [
            judge(completion, subject.text(completion, prompt))
            for completion, prompt in zip(completions, prompts, strict=True)
        ]
        return outcomes if theirs is None else self._beside(subject, prompts, outcomes, theirs)

    def _beside(
        self,
        subject: Subject,
        prompts: Sequence[Sequence[int]],
        ours: Sequence[Outcome],
        theirs: Sequence[Outcome],
    ) -> list[Outcome]:
        longest = max(len(p) + len(t.token_ids) for p, t in zip(prompts, theirs, strict=True)) + 1
        likelihood, stops = subject.likelihood(longest), subject.chat.stop_ids
        return [
            replace(our, numbers={**our.numbers, **compare(our, their, read)})
            for our, their, read in (
                (our, their, _reads(likelihood, prompt, their.token_ids, stops))
                for our, their, prompt in zip(ours, theirs, prompts, strict=True)
            )
        ]


def judge(completion: Completion, text: str) -> Outcome:
    """An answer by itself; it is right when it comes to an end."""
    ids = completion.token_ids
    return Outcome(
        right=completion.finish_reason == "stop",
        answer=text,
        numbers={"tokens": len(ids), "repeated": repeated(ids), "loops": float(loops(ids))},
        token_ids=ids,
    )


def compare(our: Outcome, their: Outcome, stops: Sequence[bool]) -> dict[str, float]:
    """An answer beside the reference's. `stops`: before which of its tokens, and behind the last,
    this model would stop. Where the reference does not stop there is nothing to agree with."""
    same = (a == b for a, b in zip(our.token_ids, their.token_ids, strict=False))
    agreed = next((i for i, equal in enumerate(same) if not equal), None)
    shorter = min(len(our.token_ids), len(their.token_ids))
    found = {
        "stops_early": float(any(stops[:-1])),
        "agreed": (shorter if agreed is None else agreed) / max(len(their.token_ids), 1),
    }
    return {**found, "stops_there": float(stops[-1])} if their.right else found


def _reads(
    likelihood: Likelihood,
    prompt: Sequence[int],
    answer: Sequence[int],
    stops: Collection[int],
) -> list[bool]:
    """Before which tokens of an answer, and behind the last, the model would stop."""
    ids = [*prompt, *answer, *list(stops)[:1]]
    return [int(token) in stops for token in likelihood(ids, len(prompt)).likeliest]


def read_answers(path: Path, settings: Settings) -> Answers:
    """The questions of a file."""
    lines = read_lines(path, settings.limit)
    return Answers([_question(line) for line in lines], settings.max_tokens)


def _question(line: Line) -> Messages:
    messages = messages_of(line)
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise line.wrong("has no question")
    return messages[: last + 1]
