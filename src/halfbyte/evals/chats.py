"""Conversations as windows that score the answers, and nothing but the answers.

A file of JSON lines, each `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "response"}`.
Every answer becomes a window: the conversation up to it in the model's own template, then the
answer and the token that ends a turn, which alone are scored. So a model that knows its answers
but not when to stop is found out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals.texts import Reading, Window
from halfbyte.formats.conversations import Message, messages_of
from halfbyte.formats.lines import Line, read_lines
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer


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
