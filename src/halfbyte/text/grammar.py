"""How one model's answers are divided: the marks around its thoughts and its tool calls.

Found from the vocabulary and the template, never from the model's name. A mark that the vocabulary
has as a token is known by its id, so its spelling in plain letters is text. A mark without a token
of its own counts only where the template spells it, and then its letters are the mark.

Source: the prompt formats of Gemma 4, Qwen 3 and Mistral.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import Dialect, dialect_of


class Mark(Enum):
    """What a mark does."""

    THOUGHT_OPENS = auto()
    THOUGHT_CLOSES = auto()
    CALL_OPENS = auto()
    CALL_CLOSES = auto()
    QUOTE = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """The marks around a thought, and the `heading` that may stand on its first line."""

    opens: str
    closes: str
    heading: str = ""


THOUGHTS = (
    Thoughts(opens="<|channel>", closes="<channel|>", heading="thought"),
    Thoughts(opens="<think>", closes="</think>"),
    Thoughts(opens="[THINK]", closes="[/THINK]"),
)
_NO_CALLS: Mapping[str, Mark] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """Marks by token id, and by text: those of thoughts, and those of calls."""

    thoughts: Thoughts | None
    dialect: Dialect | None
    ids: Mapping[int, Mark]
    thought_texts: Mapping[str, Mark]
    call_texts: Mapping[str, Mark]

    def texts(self, *, tools: bool) -> dict[str, Mark]:
        """Letters that are marks: those of calls only when tools were offered."""
        return {**self.thought_texts, **(self.call_texts if tools else _NO_CALLS)}


def grammar_of(tokenizer: Tokenizer, template: str | None) -> Grammar:
    """The grammar of a model with this vocabulary and chat template."""
    template = template or ""

    def is_token(string: str) -> bool:
        return tokenizer.token_id(string) is not None

    thoughts = next((t for t in THOUGHTS if is_token(t.opens) and is_token(t.closes)), None)
    thoughts = thoughts or next((t for t in THOUGHTS if t.closes in template), None)
    dialect = dialect_of(is_token, template)
    ids: dict[int, Mark] = {}
    return Grammar(
        thoughts=thoughts,
        dialect=dialect,
        thought_texts=_sorted_out(_thought_marks(thoughts), tokenizer, ids),
        call_texts=_sorted_out(_call_marks(dialect), tokenizer, ids),
        ids=ids,
    )


def _thought_marks(thoughts: Thoughts | None) -> dict[str, Mark]:
    if thoughts is None:
        return {}
    return {thoughts.opens: Mark.THOUGHT_OPENS, thoughts.closes: Mark.THOUGHT_CLOSES}


def _call_marks(dialect: Dialect | None) -> dict[str, Mark]:
    if dialect is None:
        return {}
    kinds = (Mark.CALL_OPENS, Mark.CALL_CLOSES, Mark.QUOTE)
    strings = (dialect.opens, dialect.closes, dialect.quote)
    return {string: kind for string, kind in zip(strings, kinds, strict=True) if string}


def _sorted_out(
    marks: Mapping[str, Mark], tokenizer: Tokenizer, ids: dict[int, Mark]
) -> dict[str, Mark]:
    """Adds the marks that are tokens to `ids`; returns the others."""
    found = {string: tokenizer.token_id(string) for string in marks}
    ids |= {index: marks[string] for string, index in found.items() if index is not None}
    return {string: kind for string, kind in marks.items() if found[string] is None}
