"""The chat at a terminal.

Ctrl-C stops an answer and keeps the conversation, and gives a line up; twice at the empty prompt,
or Ctrl-D, leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfbyte.cli.commands import NO_PICTURES, completions, named_pictures, obey
from halfbyte.cli.console import complain, note
from halfbyte.cli.conversation import Conversation
from halfbyte.cli.run import Manner
from halfbyte.cli.terminal import Keyboard, Line, line_editing
from halfbyte.errors import HalfbyteError

if TYPE_CHECKING:
    from halfbyte.llm import LLM


def converse(llm: LLM, manner: Manner, *, stats: bool) -> None:
    """Talks until the person leaves."""
    conversation = Conversation(llm, manner, stats=stats)
    keyboard = Keyboard()
    note(f"A chat, with room for {llm.context} tokens. /help lists the commands.")
    with line_editing(completions):
        while (line := keyboard.read()) is not None:
            try:
                _turn(conversation, line)
            except HalfbyteError as error:
                complain(error)
            except KeyboardInterrupt:
                note("\n(stopped)")
            except EOFError:
                return


def _turn(conversation: Conversation, line: Line) -> None:
    if line.is_command:
        obey(conversation, line.text)
    elif named_pictures(line.text):
        note(NO_PICTURES)
    elif line.text.strip():
        conversation.say(line.text)
        note("")
