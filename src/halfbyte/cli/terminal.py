"""Lines typed at a terminal: several to a message, with editing, history and completion.

Where Python has no readline, the same without those three. The history lies in the cache folder,
readable by its owner only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import click

from halfbyte import env
from halfbyte.cli.console import colour, note

QUOTES = '"""'
HISTORY_LINES = 1000

Complete = Callable[[str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Line:
    """What a person typed; whether it is a command."""

    text: str
    is_command: bool = False


class Keyboard:
    """Reads messages and commands, one after the other."""

    def __init__(self) -> None:
        self._interrupted = False

    def read(self) -> Line | None:
        """A message or command, empty after Ctrl-C; None for Ctrl-D, and for Ctrl-C twice."""
        try:
            line = _line()
        except EOFError:
            note("")
            return None
        except KeyboardInterrupt:
            return self._interrupt()
        self._interrupted = False
        return line

    def _interrupt(self) -> Line | None:
        note("")
        if _typed():  # it is given up, and that was all
            return Line("")
        if self._interrupted:
            return None
        self._interrupted = True
        note("(once more to leave)")
        return Line("")


@contextmanager
def line_editing(complete: Complete) -> Generator[None]:
    """readline for `input`, if there is one: `complete` gives the lines that a line may become."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = env.cache_dir() / "chat_history"
    readline.clear_history()
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    readline.set_completer_delims("")
    readline.set_completer(lambda line, index: _pick(complete(line), index))
    edits_like_bsd = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if edits_like_bsd else "tab: complete")
    try:
        yield
    finally:
        readline.set_completer(None)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _pick(lines: Sequence[str], index: int) -> str | None:
    return lines[index] if index < len(lines) else None


def _line() -> Line:
    first = input(_prompt(">>> "))
    if first.startswith(QUOTES):
        return Line(_quoted(first.removeprefix(QUOTES)))
    text = first
    while text.endswith("\\"):
        text = text[:-1] + "\n" + input(_prompt("... "))
    return Line(text, is_command=first.startswith("/"))


def _quoted(text: str) -> str:
    while not text.endswith(QUOTES):
        text += "\n" + input(_prompt("... "))
    return text.removesuffix(QUOTES).strip("\n")


def _prompt(text: str) -> str:
    if colour() is False or not sys.stdout.isatty():
        return text
    # readline counts what is between these two as taking no room.
    start, end = click.style("|", fg="cyan", bold=True).split("|")
    return f"\001{start}\002{text}\001{end}\002" if "readline" in sys.modules else text


def _typed() -> bool:
    """Whether an interrupted line had something in it."""
    readline = sys.modules.get("readline")
    return readline is not None and bool(readline.get_line_buffer().strip())
