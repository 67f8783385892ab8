"""Tool calls in the words of each model: which strings begin and end one, and what its body says.

A model is told of tools by its template, which renders their declarations, the calls of the past
and their results; here is the way back, from what it generated to calls. Four dialects (the marks
are tokens of the vocabulary, see grammar.py; QUOTE is the token <|"|>):

    gemma4     "<|tool_call>" "call:" NAME map "<tool_call|>"
               map = "{" [ key ":" value { "," key ":" value } ] "}"     key = bare text | string
               value = string | map | "[" [ value { "," value } ] "]" | number | true | false | null
               string = QUOTE any text, nothing is escaped, QUOTE
               <|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>
    hermes     "<tool_call>" object "</tool_call>"                       (Hermes, Qwen 2.5 and 3)
               <tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>
    mistral    "[TOOL_CALLS]" "[" object { "," object } "]", to the end of the answer
    llama3     [ "<|python_tag|>" ] object { ";" object }, to the end of the answer
               {"name": "weather", "parameters": {"city": "Rome"}}

    object = JSON with "name" and either "arguments" or "parameters", a map (or a map as a string)

What does not follow the grammar is `MalformedCallError`, for answer.py to show as text with the
reason: what a model writes is never an error of ours. Sizes and depths are bounded. The price: no
mending of almost right calls. Not here: calls in other clothes (Qwen 3 Coder's XML, Mistral's
NAME[ARGS]{...}, Llama's built-in tools as Python); and nothing here runs a tool.

Source: Gemma 4's prompt format; the function calling guides of Hermes, Qwen, Mistral and Llama 3.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

MAX_BODY_CHARACTERS = 2**18
MAX_DEPTH = 32
# Decoded text never has a surrogate, so the quote's token cannot be confused with its spelling.
QUOTE = "\udc00"

_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s;,]*")
_NAME = re.compile(rf"[^\s{{}}\[\],{QUOTE}]+")
_KEY = re.compile(rf"[^:{{}}\[\],{QUOTE}]+")
_WORD = re.compile(rf"[^\s{{}}\[\],:{QUOTE}]+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool's name and its arguments: None, bool, int, float, str, lists and dicts of them."""

    name: str
    arguments: dict[str, Any]


class MalformedCallError(ValueError):
    """The text is no call; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a model writes a call. `closes` None: it goes on to the end of the answer.

    `bare`: an answer that is nothing but an object may be one too. `hands_over`: the token by
    which a model asks for the result inside its turn; it ends an answer.
    """

    name: str
    opens: str
    parse: Callable[[str], list[ToolCall]]
    closes: str | None = None
    quote: str | None = None
    bare: bool = False
    hands_over: str | None = None

    @property
    def marks(self) -> list[str]:
        return [mark for mark in (self.opens, self.closes, self.quote) if mark is not None]


def calls_from_json(body: str) -> list[ToolCall]:
    """The calls of a JSON object, a list of them, or several behind each other."""
    try:
        calls = [_call_of(value) for value in _json_values(body)]
    except MalformedCallError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedCallError(f"it is not JSON ({error})") from error
    if not calls:
        raise MalformedCallError("it is empty")
    return calls


def calls_from_gemma(body: str) -> list[ToolCall]:
    """The call between <|tool_call> and <tool_call|>, where QUOTE stands for <|"|>."""
    return [_Gemma(body).call()]


def arguments_of(value: object) -> dict[str, Any]:
    """Arguments as a mapping; clients and some models write them as a string of JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}", parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise MalformedCallError(f"the arguments are not JSON ({error})") from error
    if not isinstance(value, dict):
        raise MalformedCallError("the arguments are no object")
    _check(value)
    return cast("dict[str, Any]", value)


DIALECTS = (
    Dialect(
        name="gemma4",
        opens="<|tool_call>",
        closes="<tool_call|>",
        quote='<|"|>',
        parse=calls_from_gemma,
        hands_over="<|tool_response>",
    ),
    Dialect(name="hermes", opens="<tool_call>", closes="</tool_call>", parse=calls_from_json),
    Dialect(name="mistral", opens="[TOOL_CALLS]", parse=calls_from_json),
    Dialect(
        name="llama3",
        opens="<|python_tag|>",
        parse=calls_from_json,
        bare=True,
        hands_over="<|eom_id|>",
    ),
)


def dialect_of(is_token: Callable[[str], bool], template: str) -> Dialect | None:
    """The dialect whose opening the template spells; else the one whose marks are all tokens."""
    spelled = (d for d in DIALECTS if d.opens in template and (not d.quote or is_token(d.quote)))
    known = (d for d in DIALECTS if all(map(is_token, d.marks)))
    return next(spelled, None) or next(known, None)


def _json_values(text: str) -> Iterator[object]:
    decoder = json.JSONDecoder(parse_constant=_refuse)
    at = _end(_BETWEEN, text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield from cast("list[object]", value) if isinstance(value, list) else [value]
        at = _end(_BETWEEN, text, at)


def _call_of(value: object) -> ToolCall:
    if not isinstance(value, dict):
        raise MalformedCallError("it is no object")
    fields = cast("dict[str, object]", value)
    name = fields.get("name")
    if not isinstance(name, str) or not name:
        raise MalformedCallError("it has no name")
    for key in ("arguments", "parameters"):
        if key in fields:
            return ToolCall(name, arguments_of(fields[key]))
    raise MalformedCallError("it has no arguments")


def _check(value: object) -> None:
    """Refuse what could not be rendered again: too deep, not finite, half a character."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for outer in level for item in _inside(outer)]
        if not level:
            return
    raise MalformedCallError(f"it is nested more than {MAX_DEPTH} deep")


def _inside(value: object) -> list[object]:
    match value:
        case dict():
            items = cast("dict[str, object]", value)
            return [*items, *items.values()]
        case list():
            return cast("list[object]", value)
        case float() if not math.isfinite(value):
            raise MalformedCallError("it has a number that is too large")
        case str() if not _is_whole(value):
            raise MalformedCallError("it has half a character (a lone surrogate)")
        case _:
            return []


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse(constant: str) -> None:
    raise MalformedCallError(f"it has the number {constant}")


def _end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where a pattern that matches anything, even nothing, ends."""
    found = pattern.match(text, start)
    assert found is not None
    return found.end()


class _Gemma:
    """Reads one call of Gemma 4's grammar, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def call(self) -> ToolCall:
        self._expect("call:")
        name = self._match(_NAME, "a name")
        arguments = self._map(1)
        if self._peek():
            raise MalformedCallError(f"something follows the call, at character {self._at}")
        _check(arguments)
        return ToolCall(name, arguments)

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise MalformedCallError(f"it is nested more than {MAX_DEPTH} deep")
        match self._peek():
            case "{":
                return self._map(depth + 1)
            case "[":
                return self._list(depth + 1)
            case "\udc00":  # QUOTE
                return self._string()
            case _:
                return self._scalar()

    def _map(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._expect("{")
        while not self._ends("}", found):
            key = self._string() if self._peek() == QUOTE else self._match(_KEY, "a key").strip()
            self._expect(":")
            found[key] = self._value(depth)
        return found

    def _list(self, depth: int) -> list[Any]:
        found: list[Any] = []
        self._expect("[")
        while not self._ends("]", found):
            found.append(self._value(depth))
        return found

    def _ends(self, closing: str, found: object) -> bool:
        """Whether the collection ends here; the comma before a further item is taken."""
        if self._peek() == closing:
            self._at += 1
            return True
        if found:
            self._expect(",")
        return False

    def _string(self) -> str:
        self._expect(QUOTE)
        end = self._text.find(QUOTE, self._at)
        if end < 0:
            raise MalformedCallError("a string does not end")
        start, self._at = self._at, end + 1
        return self._text[start:end]

    def _scalar(self) -> bool | int | float | None:
        word = self._match(_WORD, "a value")
        if word in _WORDS:
            return _WORDS[word]
        if not _NUMBER.fullmatch(word):
            raise MalformedCallError(f"{word[:40]!r} is no value")
        try:
            return int(word) if word.lstrip("-").isdigit() else float(word)
        except ValueError as error:  # Python reads whole numbers up to a length
            raise MalformedCallError("it has a number that is too long") from error

    def _peek(self) -> str:
        self._at = _end(_SPACE, self._text, self._at)
        return self._text[self._at : self._at + 1]

    def _expect(self, text: str) -> None:
        self._peek()
        if not self._text.startswith(text, self._at):
            raise MalformedCallError(f"no {text.replace(QUOTE, 'quote')!r} at character {self._at}")
        self._at += len(text)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        self._peek()
        found = pattern.match(self._text, self._at)
        if found is None:
            raise MalformedCallError(f"no {what} at character {self._at}")
        self._at = found.end()
        return found[0]
