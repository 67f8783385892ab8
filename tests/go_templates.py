"""As much of Go's text/template as the templates that we write have: actions, variables, if, range.

No white space is trimmed, since they trim none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

TOKEN = re.compile(r"\{\{ ((?:\"(?:[^\"\\]|\\.)*\"|[^\"])*?) \}\}", re.DOTALL)
WORD = re.compile(r"\"(?:[^\"\\]|\\.)*\"|\S+")
BLOCK = re.compile(r"(?:else )?if |range |else$|end$")
Node = tuple[str, Any]


def execute(template: str, data: Mapping[str, Any]) -> str:
    nodes, rest = _parsed(list(_tokens(template)))
    assert not rest, rest
    return "".join(_run(nodes, {"$": data}, data))


def _tokens(template: str) -> Iterator[Node]:
    place = 0
    for match in TOKEN.finditer(template):
        yield "text", template[place : match.start()]
        yield "action", match[1]
        place = match.end()
    yield "text", template[place:]


def _parsed(tokens: Sequence[Node]) -> tuple[list[Node], Sequence[Node]]:
    """Nodes up to an `else` or an `end`, and the tokens from there."""
    nodes: list[Node] = []
    while tokens:
        kind, value = tokens[0]
        if kind == "action" and (value == "end" or value.startswith("else")):
            break
        if kind == "action" and BLOCK.match(value):
            node, tokens = _block(value, tokens[1:])
            nodes.append(node)
        else:
            nodes.append((kind, value))
            tokens = tokens[1:]
    return nodes, tokens


def _block(opening: str, tokens: Sequence[Node]) -> tuple[Node, Sequence[Node]]:
    word, condition = opening.split(" ", 1)
    then, tokens = _parsed(tokens)
    following = tokens[0][1]
    if following == "end":
        return (word, (condition, then, [])), tokens[1:]
    if following == "else":
        otherwise, tokens = _parsed(tokens[1:])
        assert tokens[0][1] == "end"
        return (word, (condition, then, otherwise)), tokens[1:]
    inner, tokens = _block(following.removeprefix("else "), tokens[1:])
    return (word, (condition, then, [inner])), tokens


def _run(nodes: Sequence[Node], variables: dict[str, Any], dot: Any) -> Iterator[str]:
    for kind, value in nodes:
        if kind == "text":
            yield value
        elif kind == "action":
            yield _action(value, variables, dot)
        elif kind == "range":
            for item in _value(value[0], variables, dot):
                yield from _run(value[1], variables, item)
        else:
            taken = value[1] if _value(value[0], variables, dot) else value[2]
            yield from _run(taken, variables, dot)


def _action(action: str, variables: dict[str, Any], dot: Any) -> str:
    parts = re.split(r" :?= ", action, maxsplit=1)
    if len(parts) == 2 and parts[0].startswith("$"):
        variables[parts[0]] = _value(parts[1], variables, dot)
        return ""
    return str(_value(action, variables, dot))


def _value(expression: str, variables: Mapping[str, Any], dot: Any) -> Any:
    words = WORD.findall(expression)
    if words[0] in ("eq", "ne"):
        left, right = (_value(word, variables, dot) for word in words[1:])
        return (left == right) == (words[0] == "eq")
    (word,) = words
    if word.startswith('"'):
        return json.loads(word)
    if word in ("true", "false"):
        return word == "true"
    start, *fields = word.split(".")
    found = variables[start] if start else dot
    for field in fields:
        found = found[field]
    return found
