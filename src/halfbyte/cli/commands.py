"""The commands of a chat: one table, from which /help, completion and obedience follow."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.cli.console import note
from halfbyte.cli.conversation import Conversation
from halfbyte.errors import InvalidInputError

NO_PICTURES = "this model's text part runs; pictures are not supported yet"
KNOBS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tiff", ".heic")
_KEYS = (
    '  """ text """         a message of several lines; so does \\ at the end of a line\n'
    "  Ctrl-C, Ctrl-D       stop the answer; leave"
)


@dataclass(frozen=True, slots=True)
class Command:
    """What follows the word, what it does in a line, and the doing."""

    arguments: str
    text: str
    run: Callable[[Conversation, str], None]


def obey(conversation: Conversation, line: str) -> None:
    """Carries out a command; EOFError to leave."""
    word, _, rest = line.strip().partition(" ")
    word = ALIASES.get(word, word)
    if word in COMMANDS:
        COMMANDS[word].run(conversation, rest.strip())
    else:
        note(f'unknown command {word}; /help lists them, """ begins a message with a slash')


def completions(line: str) -> list[str]:
    """The lines that this one may become; none for a message."""
    word, space, rest = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not space:
        return [f"{name} " if c.arguments else name for name, c in COMMANDS.items()
                if name.startswith(word)]  # fmt: skip
    if word == "/set":
        return [f"/set {knob} " for knob in KNOBS if knob.startswith(rest)]
    if word in ("/save", "/load"):
        return [f"{word} {path}" for path in sorted(glob.glob(glob.escape(rest) + "*"))]  # noqa: PTH207
    return []


def _help(_conversation: Conversation, _rest: str) -> None:
    for name, command in COMMANDS.items():
        note(f"  {f'{name} {command.arguments}':20} {command.text}")
    note(_KEYS)


def _clear(conversation: Conversation, _rest: str) -> None:
    conversation.clear()
    note("a new conversation")


def _system(conversation: Conversation, rest: str) -> None:
    conversation.manner = replace(conversation.manner, system=rest or None)
    conversation.clear()
    note("a new conversation " + ("with this system message" if rest else "without one"))


def _think(conversation: Conversation, _rest: str) -> None:
    _set_thinking(conversation, True)


def _no_think(conversation: Conversation, _rest: str) -> None:
    _set_thinking(conversation, False)


def _set_thinking(conversation: Conversation, think: bool) -> None:
    conversation.manner = replace(conversation.manner, think=think)
    if conversation.llm.turns.can_think:
        note(f"thinking {'on' if think else 'off'}")
    else:
        note("this model's template has no switch for thinking")


def _adapter(conversation: Conversation, rest: str) -> None:
    """Another adapter from the next answer on; without a name the model as it is."""
    loaded = conversation.llm.decoder.adapters
    if rest and rest not in loaded:
        raise InvalidInputError(
            f"no adapter '{rest}'", hint="loaded: " + (", ".join(loaded) or "none")
        )
    conversation.manner = replace(conversation.manner, adapter=rest or None)
    note(f"answers come with {rest}" if rest else "answers come from the model as it is")


def _retry(conversation: Conversation, _rest: str) -> None:
    conversation.retry()


def _undo(conversation: Conversation, _rest: str) -> None:
    question = conversation.undo()
    if question is not None:
        note(f"taken back: {question}")


def _stats(conversation: Conversation, _rest: str) -> None:
    conversation.stats = not conversation.stats
    note(f"stats {'on' if conversation.stats else 'off'}")


def _save(conversation: Conversation, rest: str) -> None:
    conversation.save(_path(rest, "/save"))
    note(f"saved {len(conversation.messages)} messages")


def _load(conversation: Conversation, rest: str) -> None:
    conversation.load(_path(rest, "/load"))
    note(f"loaded {len(conversation.messages)} messages")


def _path(text: str, command: str) -> Path:
    if not text:
        raise InvalidInputError(f"{command} needs the name of a file")
    return _expanded(text)


def _set(conversation: Conversation, rest: str) -> None:
    name, _, text = rest.replace("=", " ").partition(" ")
    name = name.replace("-", "_")
    if name:
        _turn(conversation, name, text.strip())
    manner = conversation.manner
    used = asdict(conversation.llm.sampling(**manner.sampling))  # pyright: ignore[reportArgumentType]
    used["max_tokens"] = manner.max_tokens or "to the end of the context"
    for knob in [name] if name else KNOBS:
        note(f"  {knob:20} {used[knob]}")


def _turn(conversation: Conversation, name: str, text: str) -> None:
    """Sets a knob; without a value it is the model's own again."""
    if name not in KNOBS:
        raise InvalidInputError(f"no knob '{name}'", hint="there are " + ", ".join(KNOBS))
    manner, value = conversation.manner, _number(name, text)
    if name == "max_tokens":
        conversation.manner = replace(manner, max_tokens=value)
        return
    sampling: dict[str, Any] = {**manner.sampling, name: value}
    conversation.llm.sampling(**sampling)  # refuses what is out of range
    conversation.manner = replace(manner, sampling=sampling)


def _number(name: str, text: str) -> Any:
    if not text and name != "seed":
        return None
    try:
        value = KNOBS[name](text)
    except ValueError as error:
        kind = "a whole number" if KNOBS[name] is int else "a number"
        raise InvalidInputError(f"{name} is {text!r}; it must be {kind}") from error
    if name == "max_tokens" and value < 1:
        raise InvalidInputError(f"max_tokens is {value}; it must be at least 1")
    return value


def _image(_conversation: Conversation, _rest: str) -> None:
    note(NO_PICTURES)


def _exit(_conversation: Conversation, _rest: str) -> None:
    raise EOFError


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/clear": Command("", "begin anew", _clear),
    "/system": Command("TEXT", "set the system message, and begin anew", _system),
    "/think": Command("", "let the model think first", _think),
    "/no-think": Command("", "or not", _no_think),
    "/adapter": Command("NAME", "answer with another --lora; alone with none", _adapter),
    "/retry": Command("", "take the last answer back and ask again", _retry),
    "/undo": Command("", "take the last question and its answer back", _undo),
    "/set": Command("NAME VALUE", "temperature, top_k, ...; alone it shows them", _set),
    "/stats": Command("", "speed and memory after each answer, or not", _stats),
    "/save": Command("FILE", "write the conversation to a file", _save),
    "/load": Command("FILE", "go on with one", _load),
    "/image": Command("FILE", "not yet", _image),
    "/exit": Command("", "leave", _exit),
}
ALIASES = {"/?": "/help", "/quit": "/exit", "/bye": "/exit"}


def named_pictures(text: str) -> bool:
    """Whether a message names a picture that is there: then it is meant to be looked at."""
    words = (word.strip("'\"") for word in text.split())
    return any(word.lower().endswith(_PICTURES) and _is_file(word) for word in words)


def _is_file(text: str) -> bool:
    try:
        return _expanded(text).is_file()
    except OSError:  # no name of a file at all
        return False


def _expanded(text: str) -> Path:
    """A path as typed; "~" is the home folder, where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
