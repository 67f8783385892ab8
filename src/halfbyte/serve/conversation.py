"""Messages as clients send them, made messages as templates read them. Pure."""

from __future__ import annotations

from halfbyte.serve.failure import refused
from halfbyte.serve.wire import Message, Object

ROLES = {"developer": "system", "function": "tool"}
TEXTS = ("text", "input_text", "output_text", "refusal")


def message_of(given: Message, place: str) -> Object:
    """One message; `place` is what a refusal calls it. Raises `Failure`."""
    message: Object = {
        "role": ROLES.get(given.role, given.role),
        "content": text_of(given, place),
    }
    thought = given.reasoning_content or given.reasoning
    for key, value in (
        ("name", given.name),
        ("tool_calls", given.tool_calls),
        ("tool_call_id", given.tool_call_id),
        ("reasoning_content", thought),
    ):
        if value:
            message[key] = value
    return message


def text_of(given: Message, place: str) -> str:
    """The text of a message's content. Raises `Failure` for parts that are no text."""
    if isinstance(given.content, str) or given.content is None:
        return given.content or ""
    texts: list[str] = []
    for index, part in enumerate(given.content):
        if part.type not in TEXTS:
            raise refused(
                f"this model reads text only, not '{part.type[:40]}'", f"{place}.content.{index}"
            )
        texts.append(part.text or part.refusal or "")
    return "\n".join(texts)
