"""A conversation with one model: its messages, and what a person may do to them.

Old messages are never dropped in silence: a conversation that outgrows the context says so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from halfbyte.cli.console import note
from halfbyte.cli.run import Manner, begin, show, summary, warn_if_cut
from halfbyte.errors import InvalidInputError

if TYPE_CHECKING:
    from halfbyte.llm import LLM

SCHEMA = "halfbyte.chat/1"
MAX_FILE_BYTES = 2**26
_ROLES = ("system", "user", "assistant")


class Conversation:
    """The messages so far: maybe a system message, then questions with their answers."""

    def __init__(self, llm: LLM, manner: Manner, *, stats: bool) -> None:
        self.llm = llm
        self.manner = manner
        self.stats = stats
        self.messages: list[dict[str, str]] = []
        self._unanswered: str | None = None
        self.clear()

    def clear(self) -> None:
        """Begins anew, with the system message."""
        system = self.manner.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._unanswered = None

    def say(self, text: str) -> None:
        """Asks, and shows the answer. Without an answer nothing is kept, but `retry` knows it."""
        self._unanswered = text
        question = {"role": "user", "content": text}
        said = self._answer([*self.messages, question])
        if said:
            self.messages += [question, {"role": "assistant", "content": said}]
            self._unanswered = None
        else:
            note("(no answer, so the message is not kept; /retry sends it again)")

    def retry(self) -> None:
        """Asks the last question again, with other noise."""
        question = self.undo() if self._unanswered is None else self._unanswered
        if question is None:
            return
        seed = (int(self.manner.sampling["seed"] or 0) + 1) % 2**64
        self.manner = replace(self.manner, sampling={**self.manner.sampling, "seed": seed})
        self.say(question)

    def undo(self) -> str | None:
        """Takes the last question and its answer back; returns the question."""
        self._unanswered = None
        if not self.messages or self.messages[-1]["role"] != "assistant":
            note("there is nothing to take back")
            return None
        self.messages.pop()
        return self.messages.pop()["content"]

    def save(self, path: Path) -> None:
        """Writes the messages as JSON."""
        from halfbyte.formats.atomic import write_file

        document = {"schema": SCHEMA, "messages": self.messages}
        data = (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
        write_file(path, data)

    def load(self, path: Path) -> None:
        """Takes the messages of a file that `save` wrote. A bad file changes nothing."""
        messages = _read(path)
        self._unanswered = None
        self.messages = messages
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.manner = replace(self.manner, system=system)

    def _answer(self, messages: list[dict[str, str]]) -> str:
        """What is said to these messages, shown. One that is stopped stays as far as it went."""
        ids = self.llm.chat_ids(messages, think=self.manner.think)
        self._require_room(len(ids))
        reply = begin(self.llm, ids, self.manner)
        try:
            show(reply)
        except KeyboardInterrupt:
            note("\n(stopped)")
        if self.stats and reply.completion is not None:
            note(summary(self.llm, reply))
        warn_if_cut(self.llm, reply, "/undo and /clear make room, --context gives more")
        return reply.answer.text

    def _require_room(self, used: int) -> None:
        if used >= self.llm.context:
            limit = self.llm.spec.context
            more = f"; --context gives up to {limit}" if limit > self.llm.context else ""
            raise InvalidInputError(
                f"the conversation has {used} tokens and the context holds {self.llm.context};"
                " nothing was dropped",
                hint=f"/undo takes the last exchange back, /clear begins anew{more}",
            )


def _read(path: Path) -> list[dict[str, str]]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidInputError("too large for a conversation", where=path)
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(error.strerror or str(error), where=path) from error
    except (ValueError, RecursionError) as error:
        raise _no_conversation(path) from error
    found = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    messages = found.get("messages")
    if found.get("schema") != SCHEMA or not isinstance(messages, list):
        raise _no_conversation(path)
    kept = [_message(message, path) for message in cast("list[object]", messages)]
    turns = kept[1:] if kept and kept[0]["role"] == "system" else kept
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise _no_conversation(path)
    return kept


def _message(value: object, path: Path) -> dict[str, str]:
    match value:
        case {"role": str() as role, "content": str() as content} if role in _ROLES:
            return {"role": role, "content": content}
        case _:
            raise _no_conversation(path)


def _no_conversation(path: Path) -> InvalidInputError:
    return InvalidInputError(
        "not a conversation that /save wrote", where=path, hint=f'its schema is "{SCHEMA}"'
    )
