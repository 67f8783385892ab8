"""Tool calls: does a model that is offered tools call one that exists, with arguments that fit?

Lines of JSON with `prompt` or `messages`, `tools` (declarations in JSON schema), and maybe
`expected`: {"name", "arguments"}, of which the named arguments must be equal. Calls are found by
the model's own grammar (`halfbyte.text.tools`); nothing is run. Right is an answer that makes one
call or more, every one of them valid, and the expected one among them.

Of JSON schema the part that declarations use is checked: type, properties, required, items, enum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from halfbyte.evals.tasks.outcome import Outcome
from halfbyte.evals.tasks.settings import Settings
from halfbyte.evals.tasks.subject import Subject
from halfbyte.formats.conversations import messages_of
from halfbyte.formats.lines import Line, read_lines
from halfbyte.text.tools import ToolCall

Schema = Mapping[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}


@dataclass(frozen=True, slots=True)
class Offer:
    """A conversation, the tools it offers, and the call that it should lead to, if that is told."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    expected: ToolCall | None

    @property
    def schemas(self) -> dict[str, Schema]:
        """Tool name -> the schema of its arguments."""
        functions = [tool.get("function", tool) for tool in self.tools]
        return {function["name"]: function.get("parameters", {}) for function in functions}


@dataclass(frozen=True, slots=True)
class ToolCalls:
    """Offers, and how long an answer may be."""

    items: Sequence[Offer]
    max_tokens: int

    def run(self, subject: Subject, _theirs: Sequence[Outcome] | None) -> list[Outcome]:
        prompts = [subject.chat.render(offer.messages, tools=offer.tools) for offer in self.items]
        completions = subject.complete(prompts, self.max_tokens)
        return [
            judge(offer, subject.chat.split(completion.token_ids, prompt, tools=True).calls)
            for offer, completion, prompt in zip(self.items, completions, prompts, strict=True)
        ]


def judge(offer: Offer, calls: Sequence[ToolCall]) -> Outcome:
    """The calls of an answer. `called`: there is one; `known`: all are of tools that were offered;
    `fit`: all have arguments that fit."""
    schemas = offer.schemas
    known = all(call.name in schemas for call in calls)
    fit = known and all(fits(call.arguments, schemas[call.name]) for call in calls)
    asked = offer.expected is None or any(_is(call, offer.expected) for call in calls)
    numbers = {"called": float(bool(calls))}
    if calls:
        numbers |= {"known": float(known), "fit": float(fit)}
    return Outcome(
        right=bool(calls) and fit and asked,
        answer="; ".join(f"{call.name} {call.arguments}" for call in calls),
        numbers=numbers,
    )


def fits(value: Any, schema: Schema) -> bool:
    """Whether a value is what its schema asks for; no argument that is not declared."""
    kind = schema.get("type")
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(kind, str) and not _has_type(value, kind.lower()):
        return False
    if isinstance(value, dict):
        return _has_fields(cast("dict[str, Any]", value), schema)
    if isinstance(value, list):
        return all(fits(item, schema.get("items", {})) for item in cast("list[Any]", value))
    return True


def _has_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    whole = isinstance(value, float) and value.is_integer() and kind == "integer"
    return whole or isinstance(value, TYPES.get(kind, (object,)))


def _has_fields(value: Mapping[str, Any], schema: Schema) -> bool:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return True
    required = schema.get("required", [])
    return all(name in value for name in required) and all(
        name in properties and fits(item, properties[name]) for name, item in value.items()
    )


def _is(call: ToolCall, expected: ToolCall) -> bool:
    given = call.arguments
    return call.name == expected.name and all(
        name in given and given[name] == value for name, value in expected.arguments.items()
    )


def read_offers(path: Path, settings: Settings) -> ToolCalls:
    """The offers of a file."""
    lines = read_lines(path, settings.limit)
    return ToolCalls([_offer(line) for line in lines], settings.max_tokens)


def _offer(line: Line) -> Offer:
    tools = line.fields.get("tools")
    if not isinstance(tools, list) or not tools or not all(map(_is_tool, tools)):
        raise line.wrong("'tools' is no list of declarations, each with a name")
    return Offer(messages_of(line), cast("list[Mapping[str, Any]]", tools), _expected(line))


def _is_tool(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    fields = cast("dict[str, Any]", value)
    function = fields.get("function", fields)
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _expected(line: Line) -> ToolCall | None:
    expected = line.fields.get("expected")
    if expected is None:
        return None
    if not isinstance(expected, dict) or not isinstance(expected.get("name"), str):
        raise line.wrong("'expected' has no name")
    return ToolCall(expected["name"], dict(expected.get("arguments") or {}))
