"""The messages of a conversation as chat templates expect them.

Clients of the OpenAI kind send a call's arguments as a string of JSON and name a tool's result by
the call's id; templates want a mapping and the tool's name. Everything else is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from halfbyte.errors import InvalidInputError
from halfbyte.text.tools import MalformedCallError, arguments_of


def prepared(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with arguments as mappings and a name at every tool's result.

    Raises InvalidInputError for arguments that are no mapping; the caller's messages stay as
    they are.
    """
    ready: list[dict[str, Any]] = []
    names: dict[str, object] = {}
    for index, message in enumerate(messages):
        copy = dict(message)
        if copy.get("tool_calls"):
            copy["tool_calls"] = [_call(index, call) for call in copy["tool_calls"]]
            for call in copy["tool_calls"]:
                names[str(call.get("id"))] = _function(call).get("name")
        called = names.get(str(copy.get("tool_call_id")))
        if copy.get("role") == "tool" and called is not None:
            copy.setdefault("name", called)
        ready.append(copy)
    return ready


def _call(index: int, call: object) -> dict[str, Any]:
    function = _function(call)
    try:
        arguments = arguments_of(function.get("arguments", {}))
    except MalformedCallError as error:
        raise InvalidInputError(
            str(error),
            where=f"message {index}, tool call {function.get('name')!r}",
            hint="send arguments as an object, or as JSON of one",
        ) from error
    ready = {**function, "arguments": arguments}
    fields = cast("dict[str, Any]", call)
    return {**fields, "function": ready} if "function" in fields else ready


def _function(call: object) -> dict[str, Any]:
    """The part of a call that has its name: under "function", or the call itself."""
    if not isinstance(call, Mapping):
        raise InvalidInputError("a tool call is an object with a function")
    fields = cast("Mapping[str, Any]", call)
    function = fields.get("function", fields)
    if not isinstance(function, Mapping):
        raise InvalidInputError("a tool call is an object with a function")
    return dict(cast("Mapping[str, Any]", function))
