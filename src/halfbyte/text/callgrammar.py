"""The grammar of tool calls in a model's own dialect, in llguidance's Lark.

JSON dialects leave the arguments to the library's JSON schemas. Gemma's are written out here: the
properties in the schema's order, those not required may be left out; of a value the kind, the
choices and the length of strings are held to, and nothing else.

Source: llguidance's documentation of its Lark dialect; the dialects of tools.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from halfbyte.text.tools import Dialect

Schema = Mapping[str, Any]
ANY: Schema = {"type": "object"}
PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
MAX_DEPTH = 8
# What has no schema. Strings stand between tokens and escape nothing.
_GEMMA = r"""
any_value: any_string | any_map | any_list | NUMBER | "true" | "false" | "null"
any_string: <|"|> /[^<]*/ <|"|>
any_map: "{" [any_pair ("," any_pair)*] "}"
any_pair: /[A-Za-z_][A-Za-z0-9_.\-]{0,63}/ ":" any_value
any_list: "[" [any_value ("," any_value)*] "]"
NUMBER: /-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?/
INTEGER: /-?(0|[1-9][0-9]{0,15})/
"""


def grammar_of_calls(
    tools: Sequence[Schema],
    dialect: Dialect,
    is_special: Callable[[str], bool],
    *,
    several: bool,
) -> str:
    """At least one call of these tools, at most one unless `several`."""

    def mark(text: str | None) -> str:
        if not text:
            return ""
        return text if is_special(text) else json.dumps(text)

    opens, closes = mark(dialect.opens), mark(dialect.closes)
    if dialect.bare:
        start = "call"
    elif dialect.closes is None:
        more = '(", " call)*' if several else ""
        start = f'{opens} "[" call {more} "]"'
    else:
        again = f' ("\\n"? {opens} call {closes})*' if several else ""
        start = f"{opens} call {closes}{again}"
    names = " | ".join(f"call_{index}" for index in range(len(tools)))
    rules = [f"start: {start}", f"call: {names}"]
    for index, tool in enumerate(tools):
        rules += _gemma(index, tool) if dialect.quote else _json(index, tool, dialect)
    return "\n".join(rules) + (_GEMMA if dialect.quote else "")


def _json(index: int, tool: Schema, dialect: Dialect) -> list[str]:
    key = "parameters" if dialect.bare else "arguments"
    begin = json.dumps(f'{{"name": {json.dumps(tool["name"])}, "{key}": ')
    schema = json.dumps(tool.get("parameters") or ANY)
    return [f'call_{index}: {begin} args_{index} "}}"', f"args_{index}: %json {schema}"]


def _gemma(index: int, tool: Schema) -> list[str]:
    rules = _Rules(f"args_{index}")
    value = _value(tool.get("parameters") or ANY, rules, 0)
    return [f'call_{index}: "call:" {json.dumps(tool["name"])} {value}', *rules.lines]


class _Rules:
    """Rules of a tool's own. An expression that is used twice is a rule, so a grammar is no longer
    than a multiple of its schema."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self.lines: list[str] = []

    def add(self, expression: str) -> str:
        """Its name."""
        name = f"{self._prefix}_{len(self.lines)}"
        self.lines.append(f"{name}: {expression}")
        return name


def _value(schema: object, rules: _Rules, depth: int) -> str:
    """What may stand for a value, as an expression."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return "any_value"
    found = cast(Schema, schema)
    choices = found.get("enum")
    if isinstance(choices, list) and choices:
        return "(" + " | ".join(_literal(it) for it in cast("list[object]", choices)) + ")"
    match found.get("type"):
        case "string":
            most = found.get("maxLength")
            bound = f"{{0,{most}}}" if isinstance(most, int) and 0 <= most <= 2000 else "*"
            return f'(<|"|> /[^<]{bound}/ <|"|>)'
        case "integer":
            return "INTEGER"
        case "number":
            return "NUMBER"
        case "boolean":
            return '("true" | "false")'
        case "null":
            return '"null"'
        case "array":
            item = rules.add(_value(found.get("items"), rules, depth + 1))
            return f'("[" [{item} ("," {item})*] "]")'
        case "object":
            return _map(found, rules, depth)
        case _:
            return "any_value"


def _map(schema: Schema, rules: _Rules, depth: int) -> str:
    given = schema.get("properties")
    properties = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    if not properties or not all(map(PLAIN_KEY.fullmatch, properties)):
        return "any_map"
    told = schema.get("required")
    required = cast("list[object]", told) if isinstance(told, list) else []
    pairs = [
        (rules.add(f'"{name}:" {_value(it, rules, depth + 1)}'), name in required)
        for name, it in properties.items()
    ]
    return f'("{{" {_listed(pairs, rules)} "}}")'


def _listed(items: Sequence[tuple[str, bool]], rules: _Rules) -> str:
    """Items in their order with commas between; those that are not required may be missing."""
    begun = after = ""  # from an item on: with nothing before it, and with something
    for item, needed in reversed(items):
        first = f"{item} {after}"
        begun = rules.add(first if needed or not begun else f"{first} | {begun}")
        after = rules.add(f'"," {item} {after}' if needed else f'("," {item})? {after}')
    return begun if any(needed for _, needed in items) else f"({begun})?"


def _literal(value: object) -> str:
    text = json.dumps(value)
    return f'(<|"|> {text} <|"|>)' if isinstance(value, str) else json.dumps(text)
