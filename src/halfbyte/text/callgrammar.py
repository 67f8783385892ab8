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
    value = _value(tool.get("parameters") or ANY, 0)
    return [f'call_{index}: "call:" {json.dumps(tool["name"])} {value}']


def _value(schema: object, depth: int) -> str:
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
            item = _value(found.get("items"), depth + 1)
            return f'("[" [{item} ("," {item})*] "]")'
        case "object":
            return _map(found, depth)
        case _:
            return "any_value"


def _map(schema: Schema, depth: int) -> str:
    given = schema.get("properties")
    properties = cast("dict[str, object]", given) if isinstance(given, dict) else {}
    if not properties or not all(map(PLAIN_KEY.fullmatch, properties)):
        return "any_map"
    required = cast("list[object]", schema.get("required") or [])
    pairs = {name: f'"{name}:" {_value(it, depth + 1)}' for name, it in properties.items()}
    return f'("{{" {_listed([(pairs[name], name in required) for name in pairs])} "}}")'


def _listed(items: Sequence[tuple[str, bool]]) -> str:
    """Items in their order with commas between; those that are not required may be missing.

    Grows with the square of their number: for each item that may come first, what follows it.
    """
    ways: list[str] = []
    for first, (item, needed) in enumerate(items):
        rest = "".join(f' "," {it}' if must else f' ("," {it})?' for it, must in items[first + 1 :])
        ways.append(f"{item}{rest}")
        if needed:
            return "(" + " | ".join(ways) + ")"
    return "(" + " | ".join(ways) + ")?"


def _literal(value: object) -> str:
    text = json.dumps(value)
    return f'(<|"|> {text} <|"|>)' if isinstance(value, str) else json.dumps(text)
