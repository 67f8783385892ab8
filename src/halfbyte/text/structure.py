"""Answers of a given structure: a JSON schema, or calls of tools, as masks over the vocabulary.

The grammar engine is llguidance (extra `serve`); here is how a vocabulary and a schema get into it,
and how its matcher follows an answer that drafting takes back and forth. A schema with a keyword
that it cannot hold is refused with the keyword's name, never half obeyed. Sizes are bounded, since
schemas come from strangers.

Source: llguidance's documentation of its Lark dialect and of JSON schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from halfbyte.errors import InvalidInputError, UnsupportedError
from halfbyte.specs import common
from halfbyte.text.callgrammar import grammar_of_calls
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import Dialect

MAX_SCHEMA_CHARACTERS = 2**18
MAX_SCHEMA_DEPTH = 64
# Between the parts of a JSON text; without a bound a weak model may write nothing else.
SPACES = r"[ \n]{0,20}"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class Structures:
    """Makes structures for one vocabulary; `stop_ids` end an answer that is complete."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = sorted(stop_ids)

    def of_schema(self, schema: Mapping[str, Any]) -> Structure:
        """JSON that follows a schema. Raises `InvalidInputError` naming what is wrong with it."""
        text = _bounded(schema)
        grammar = self._library().LLMatcher.grammar_from_json_schema(
            text, overrides={"whitespace_flexible": True, "whitespace_pattern": SPACES}
        )
        return self._structure(grammar)

    def of_calls(
        self, tools: Sequence[Mapping[str, Any]], dialect: Dialect, *, several: bool
    ) -> Structure:
        """Calls of these tools (name and parameters each), at least one, and nothing else."""
        for tool in tools:
            _bounded(tool)
        grammar = grammar_of_calls(tools, dialect, self._is_special, several=several)
        return self._structure(self._library().LLMatcher.grammar_from_lark(grammar))

    def _structure(self, grammar: str) -> Structure:
        matcher = self._library().LLMatcher(self._words, grammar, log_level=0)
        if matcher.is_error():
            raise InvalidInputError(_reason(matcher.get_error()), hint="simplify the schema")
        return Structure(matcher, self._stop_ids)

    def _is_special(self, mark: str) -> bool:
        found = self._tokenizer.token_id(mark)
        return found is not None and self._tokenizer.is_special(found)

    @cached_property
    def _words(self) -> Any:
        """The vocabulary as the library wants it: the bytes of every token."""
        wrapper = self._library().TokenizerWrapper(_Words(self._tokenizer, self._stop_ids))
        return self._library().LLTokenizer(wrapper, eos_token=self._stop_ids)

    def _library(self) -> Any:
        try:
            import llguidance
        except ImportError as error:
            raise UnsupportedError(
                "structured answers need the library llguidance",
                hint="pip install 'halfbyte[serve]'",
            ) from error
        return llguidance


class Structure:
    """One answer's structure. `allowed` is a function of its ids, whatever was asked before."""

    def __init__(self, matcher: Any, stop_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._ids: list[int] = []

    def allowed(self, ids: Sequence[int]) -> bytes | None:
        """The bits of the tokens that may follow; a stop id where nothing else may.

        After ids that the structure does not allow, anything may follow: there is nothing to save.
        """
        if not self._follow(ids):
            return None
        if self._matcher.is_stopped():
            return only(self._stop_ids)
        return self._matcher.compute_bitmask()

    def _follow(self, ids: Sequence[int]) -> bool:
        """Takes the matcher to the end of these ids; False if it does not take them all."""
        same = common(self._ids, ids)
        if same < len(self._ids):
            self._matcher.rollback(len(self._ids) - same)
            del self._ids[same:]
        for token in ids[same:]:
            if not self._matcher.try_consume_tokens([token]):
                return False
            self._ids.append(token)
        return True


def only(ids: Sequence[int]) -> bytes:
    """The bits of these tokens and no other."""
    mask = bytearray(max(ids, default=0) // 8 + 1)
    for token in ids:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def all_but(ids: Sequence[int], vocab: int) -> bytes:
    """The bits of all tokens of a vocabulary but these."""
    mask = bytearray(b"\xff" * (vocab // 8 + 1))
    for token in ids:
        mask[token // 8] &= ~(1 << token % 8)
    return bytes(mask)


@dataclass(frozen=True, slots=True)
class _Words:
    """A vocabulary, with the names that the library asks for."""

    tokenizer: Tokenizer
    stop_ids: Sequence[int]

    @property
    def eos_token_id(self) -> int:
        return self.stop_ids[0]

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_id

    @property
    def tokens(self) -> list[bytes]:
        words = self.tokenizer
        return [words.token_bytes(index, skip_special=False) for index in range(words.vocab_size)]

    @property
    def special_token_ids(self) -> list[int]:
        words = self.tokenizer
        return [index for index in range(words.vocab_size) if words.is_special(index)]

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self.tokenizer.encode(plain, special=False)


def _bounded(schema: Mapping[str, Any]) -> str:
    """A schema as JSON. Raises `InvalidInputError` for one that is too large or too deep."""
    level: list[object] = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [item for outer in level for item in _inside(outer)]
    text = json.dumps(schema)
    if level or len(text) > MAX_SCHEMA_CHARACTERS:
        raise InvalidInputError(
            f"the schema is nested more than {MAX_SCHEMA_DEPTH} deep, or longer than "
            f"{MAX_SCHEMA_CHARACTERS} characters",
            hint="simplify it",
        )
    return text


def _inside(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*cast("Mapping[str, object]", value).values()]
    return [*cast("list[object]", value)] if isinstance(value, list) else []


def _reason(error: str) -> str:
    """What the library says, in one line; a keyword that it lacks by name."""
    keys = re.match(r"Unimplemented keys: \[(.*?)\]", error)
    if keys is not None:
        return f"the schema has keywords that cannot be enforced: {keys[1]}"
    return "the schema cannot be used: " + " ".join(error.split())[:300]
