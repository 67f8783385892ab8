"""The chat at a terminal: a conversation with history, and a few commands.

Ctrl-C stops the answer and keeps the conversation; Ctrl-D leaves.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from halfbyte.cli.console import note
from halfbyte.cli.run import Manner, begin, show, summary, warn_if_cut
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.llm import LLM

QUOTES = '"""'
HELP = f"""\
  {QUOTES} text {QUOTES}     a message of several lines
  /system TEXT         set the system message (and begin anew)
  /think, /no-think    let the model think first, or not
  /stats               speed and memory after each answer, or not
  /retry               take the last answer back and answer again
  /clear               begin anew
  /exit                leave (or Ctrl-D)"""


class Conversation:
    """The messages so far, and what the commands change."""

    def __init__(self, llm: LLM, manner: Manner, *, stats: bool) -> None:
        self.llm = llm
        self.manner = manner
        self.stats = stats
        self.messages: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        system = self.manner.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def say(self, text: str) -> None:
        """Adds a message and shows the answer; nothing is kept of one that fails."""
        self.messages.append({"role": "user", "content": text})
        before = len(self.messages)
        try:
            self.answer()
        finally:
            if len(self.messages) == before:
                self.messages.pop()

    def answer(self) -> None:
        """Answers the last message. An answer that is stopped stays as far as it went."""
        ids = self.llm.chat_ids(self.messages, think=self.manner.think)
        reply = begin(self.llm, ids, self.manner)
        try:
            show(reply)
        except KeyboardInterrupt:
            note("\n(stopped)")
        if self.stats and reply.completion is not None:
            note(summary(self.llm, reply))
        warn_if_cut(self.llm, reply)
        self.messages.append({"role": "assistant", "content": reply.text})

    def retry(self) -> None:
        """Takes the last answer back and gives another, with other noise."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            note("there is no answer to take back")
            return
        self.messages.pop()
        seed = int(self.manner.sampling["seed"] or 0) + 1
        self.manner = replace(self.manner, sampling={**self.manner.sampling, "seed": seed})
        self.answer()


def converse(llm: LLM, manner: Manner, *, stats: bool) -> None:
    """Talks until the person leaves."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history
    conversation = Conversation(llm, manner, stats=stats)
    note("A chat. /? lists the commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    while (line := _read()) is not None:
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    return
            elif line.strip():
                conversation.say(line)
        except HalfbyteError as error:
            note(f"{click.style('error:', fg='red')} {error}")


def _read() -> str | None:
    """A message of one line, or of several between triple quotes; None at the end."""
    try:
        line = input(">>> ")
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].endswith(QUOTES):
            lines.append(input("... "))
    except EOFError:
        note("")
        return None
    except KeyboardInterrupt:
        note("\n(Ctrl-D leaves)")
        return ""
    return "\n".join(lines).removesuffix(QUOTES)


def _obey(conversation: Conversation, line: str) -> bool:
    """Carries out a command; False to leave."""
    word, _, rest = line.strip().partition(" ")
    match word:
        case "/exit" | "/quit" | "/bye":
            return False
        case "/clear":
            conversation.clear()
        case "/retry":
            conversation.retry()
        case "/stats":
            conversation.stats = not conversation.stats
            note(f"stats {'on' if conversation.stats else 'off'}")
        case "/system":
            conversation.manner = replace(conversation.manner, system=rest or None)
            conversation.clear()
        case "/think" | "/no-think":
            conversation.manner = replace(conversation.manner, think=word == "/think")
        case "/?" | "/help":
            note(HELP)
        case _:
            note(f"unknown command {word}; /? lists them")
    return True
