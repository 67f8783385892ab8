"""The conversation of a JSON line: `{"messages": [{"role", "content"}, ...]}` or `{"prompt",
"response"}`; a prompt alone is a question without an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from halfbyte.formats.lines import Line

Message = Mapping[str, Any]


def messages_of(line: Line) -> list[Message]:
    """The conversation of a line."""
    if "messages" not in line.fields:
        question = {"role": "user", "content": line.text("prompt")}
        if "response" not in line.fields:
            return [question]
        return [question, {"role": "assistant", "content": line.text("response")}]
    messages = line.fields["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)) or not messages:
        raise line.wrong("'messages' is no list of messages, each with a role and a content")
    return cast("list[Message]", messages)


def _is_message(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    fields = cast("Message", value)
    return isinstance(fields.get("role"), str) and "content" in fields
