"""Conversations as windows that score the answers, and nothing but the answers.

A file of JSON lines, each `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "response"}`.
Every answer becomes a window: the conversation up to it in the model's own template, then the
answer and the token that ends a turn, which alone are scored. So a model that knows its answers
but not when to stop is found out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from halfbyte.errors import InvalidInputError
from halfbyte.evals.lines import Line, read_lines
from halfbyte.evals.texts import Reading, Window
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

Message = Mapping[str, Any]


def read_chats(path: Path, chat: Chat, tokenizer: Tokenizer, reading: Reading) -> list[Window]:
    """The answers of a file of conversations; long ones end with the window.

    Answers whose prompt alone fills a window are left out. Raises `InvalidInputError` for a line
    that is no conversation, and where no answer is left.
    """
    found: list[Window] = []
    for line in read_lines(path):
        for messages, answer in _answers(messages_of(line), line):
            prompt = chat.render(messages)
            ids = [*prompt, *_answer_ids(chat, tokenizer, answer)][: reading.window]
            if len(ids) > len(prompt):
                found.append(Window(token_ids=ids, first=len(prompt) - 1))
            if len(found) == reading.max_windows:
                return found
    if not found:
        raise InvalidInputError(
            f"no prompt leaves room for an answer in {reading.window} tokens",
            where=path,
            hint="a larger --window",
        )
    return found


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


def _answers(messages: Sequence[Message], line: Line) -> Iterator[tuple[Sequence[Message], str]]:
    """Each answer in plain text, with what stands before it."""
    index = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i]
    if not index:
        raise line.wrong("has no answer", "lines have 'messages', or 'prompt' and 'response'")
    for i in index:
        if isinstance(messages[i]["content"], str):
            yield messages[:i], messages[i]["content"]


def _answer_ids(chat: Chat, tokenizer: Tokenizer, answer: str) -> list[int]:
    closing = chat.closing_id
    return [*tokenizer.encode(answer, special=False), *([] if closing is None else [closing])]
