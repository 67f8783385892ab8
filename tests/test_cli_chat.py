"""The chat: what its commands do to a conversation, and a person at a real (pseudo) terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from halfbyte.cli import commands, terminal
from halfbyte.cli.commands import COMMANDS, completions, named_pictures, obey
from halfbyte.cli.conversation import Conversation
from halfbyte.cli.run import Manner
from halfbyte.cli.terminal import Keyboard, Line
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.llm import LLM
from halfbyte.specs import LoadOptions
from halfbyte.text.answer import Answer, Piece, collected

SAMPLING = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 1}
WAIT_S = 90.0  # a bound for a machine under load, not a measure


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", LoadOptions(context=96, threads=1))


@pytest.fixture
def conversation(llm: LLM) -> Conversation:
    manner = Manner(
        raw=False, system=None, think=None, ignore_eos=False, max_tokens=4, sampling=dict(SAMPLING)
    )
    return Conversation(llm, manner, stats=False)


def _roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


def test_questions_and_answers_take_turns(conversation: Conversation) -> None:
    conversation.say("What is water?")
    conversation.say("And fire?")
    assert _roles(conversation) == ["user", "assistant"] * 2
    obey(conversation, "/undo")
    assert _roles(conversation) == ["user", "assistant"]
    before = conversation.messages
    obey(conversation, "/retry")  # greedy: other noise is no other answer
    assert conversation.messages == before
    assert conversation.manner.sampling["seed"] == 2
    obey(conversation, "/system  Be brief. ")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    obey(conversation, "/undo")
    obey(conversation, "/retry")
    assert _roles(conversation) == ["system"]


def test_a_full_context_drops_nothing(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation.say("What is water?")
    before = list(conversation.messages)
    with pytest.raises(InvalidInputError, match=r"96; nothing was dropped\n.*/undo.*--context"):
        conversation.say("word " * 100)
    assert conversation.messages == before
    conversation.manner = replace(conversation.manner, ignore_eos=True, max_tokens=None)
    conversation.say("Go on.")
    assert "the context of 96 tokens is full; /undo and /clear" in capsys.readouterr().err


class _Interrupted:
    """A reply that is stopped after some pieces."""

    def __init__(self, *pieces: Piece) -> None:
        self._pieces = pieces
        self.completion = None

    def __iter__(self) -> Iterator[Piece]:
        yield from self._pieces
        raise KeyboardInterrupt

    @property
    def answer(self) -> Answer:
        return collected(self._pieces)


def test_an_answer_that_is_stopped_stays_as_far_as_it_went(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = _Interrupted(Piece("hm", "thought"), Piece("It is"))
    monkeypatch.setattr("halfbyte.cli.conversation.begin", lambda *_: reply)
    conversation.say("What is water?")
    assert conversation.messages[-1] == {"role": "assistant", "content": "It is"}


def test_a_question_without_an_answer_waits_for_retry(
    conversation: Conversation,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        reply = _Interrupted(Piece("hm", "thought"))
        patch.setattr("halfbyte.cli.conversation.begin", lambda *_: reply)
        conversation.say("What is water?")
        assert conversation.messages == []
        assert "/retry sends it again" in capsys.readouterr().err
    obey(conversation, "/retry")
    assert conversation.messages[0] == {"role": "user", "content": "What is water?"}
    assert _roles(conversation) == ["user", "assistant"]


def test_a_conversation_is_saved_and_loaded(conversation: Conversation, tmp_path: Path) -> None:
    obey(conversation, "/system Be brief.")
    conversation.say("Größe?")
    saved = list(conversation.messages)
    path = tmp_path / "a chat.json"
    obey(conversation, f"/save {path}")
    obey(conversation, "/system")
    assert conversation.messages == []
    obey(conversation, f"/load {path}")
    assert conversation.messages == saved
    obey(conversation, "/clear")
    assert conversation.messages == saved[:1]


GOOD = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "[" * 100_000, '{"schema": "halfbyte.chat/1"}',
        json.dumps({"schema": "other", "messages": []}),
        json.dumps({"schema": "halfbyte.chat/1", "messages": [GOOD]}),
        json.dumps({"schema": "halfbyte.chat/1", "messages": [GOOD, GOOD]}),
        json.dumps({"schema": "halfbyte.chat/1", "messages": ["a", "b"]}),
        json.dumps({"schema": "halfbyte.chat/1", "messages": [{"role": "user", "content": 3}]}),
    ],
)  # fmt: skip
def test_a_file_that_is_no_conversation_changes_nothing(
    conversation: Conversation, tmp_path: Path, text: str
) -> None:
    conversation.say("Hi")
    before = conversation.messages
    path = tmp_path / "chat.json"
    path.write_text(text)
    with pytest.raises(InvalidInputError, match="not a conversation"):
        obey(conversation, f"/load {path}")
    with pytest.raises(InvalidInputError):
        obey(conversation, "/load ~nobody-here/chat.json")
    with pytest.raises(InvalidInputError):
        obey(conversation, f"/save {tmp_path / 'none' / 'x'}")
    with pytest.raises(InvalidInputError, match="needs the name"):
        obey(conversation, "/save")
    assert conversation.messages is before


def test_knobs_turn(conversation: Conversation, capsys: pytest.CaptureFixture[str]) -> None:
    obey(conversation, "/set temperature 0.7")
    obey(conversation, "/set top-k=5")
    obey(conversation, "/set max_tokens 3")
    assert conversation.manner.sampling["temperature"] == 0.7
    assert conversation.manner.sampling["top_k"] == 5
    assert conversation.manner.max_tokens == 3
    obey(conversation, "/set top_k")  # the model's own again
    assert conversation.llm.sampling(**conversation.manner.sampling).top_k == 64
    capsys.readouterr()
    obey(conversation, "/set")
    assert re.search(r"temperature +0\.7\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set heat 3", "no knob 'heat'"),
        ("/set temperature warm", "must be a number"),
        ("/set temperature -1", "temperature is -1"),
        ("/set temperature nan", "temperature is nan"),
        ("/set top_k 1.5", "a whole number"),
        ("/set max_tokens 0", "at least 1"),
        ("/set seed", "a whole number"),
    ],
)
def test_knobs_refuse(conversation: Conversation, line: str, says: str) -> None:
    before = conversation.manner
    with pytest.raises(HalfbyteError, match=says):
        obey(conversation, line)
    assert conversation.manner is before


def test_every_command_is_in_the_help(
    conversation: Conversation, capsys: pytest.CaptureFixture[str]
) -> None:
    obey(conversation, "/?")
    shown = capsys.readouterr().err
    assert all(f"  {name} " in shown for name in COMMANDS)
    obey(conversation, "/nonsense x")
    assert "unknown command /nonsense" in capsys.readouterr().err
    with pytest.raises(EOFError):
        obey(conversation, "/quit")


def test_thinking_is_switched_where_the_template_can(
    conversation: Conversation,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    obey(conversation, "/think")
    obey(conversation, "/no-think")
    assert conversation.manner.think is False
    assert capsys.readouterr().err == "thinking on\nthinking off\n"
    monkeypatch.setattr(type(conversation.llm.turns), "can_think", False)
    obey(conversation, "/think")
    assert "no switch" in capsys.readouterr().err


def test_pictures_are_refused_politely(
    conversation: Conversation,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    picture = tmp_path / "cat.PNG"
    assert not named_pictures(f"What is in {picture}?")
    picture.touch()
    assert named_pictures(f"What is in '{picture}' ?")
    for text in ("How do I open a .png in Python?", "~nobody-here/a.png", "x" * 5000 + ".png"):
        assert not named_pictures(text)
    obey(conversation, "/image cat.png")
    assert capsys.readouterr().err == commands.NO_PICTURES + "\n"


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk [1].json").touch()
    assert completions("/s") == ["/system ", "/set ", "/stats", "/save "]
    assert completions("/set top") == ["/set top_k ", "/set top_p "]
    assert completions("/load talk [") == ["/load talk [1].json"]
    assert completions("/clear x") == completions("Hello") == completions("") == []


def _typing(monkeypatch: pytest.MonkeyPatch, *lines: object) -> Callable[[], Line | None]:
    """A keyboard on which these are typed; an exception is raised."""
    typed = iter(lines)

    def answer(_prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(terminal, "_typed", lambda: False)
    return Keyboard().read


def test_lines_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    read = _typing(
        monkeypatch,
        "one", "two \\", "lines", '"""', " a", "", 'b"""', '"""/c"""', "/d", EOFError(),
    )  # fmt: skip
    lines = [read() for _ in range(6)]
    assert lines == [
        Line("one"), Line("two \nlines"), Line(" a\n\nb"), Line("/c"), Line("/d", is_command=True),
        None,
    ]  # fmt: skip


def test_ctrl_c_leaves_when_it_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = KeyboardInterrupt()
    read = _typing(monkeypatch, stop, "go on", stop, stop)
    assert [read(), read(), read(), read()] == [Line(""), Line("go on"), Line(""), None]


class Person:
    """Someone at a terminal: types, and reads what is on the screen."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        ours, theirs = pty.openpty()
        self._screen = ours
        self._unread = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "halfbyte", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0) and None,
            env={**os.environ, "TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
            | environment,
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        """Types, a moment after what was seen: a key between a prompt and its reading is lost."""
        time.sleep(0.3)
        os.write(self._screen, text.encode())

    def sees(self, pattern: str) -> str:
        """Waits until the screen shows this, and returns what came up to its end."""
        end = time.monotonic() + WAIT_S
        while (found := re.search(pattern, self._unread)) is None:
            assert time.monotonic() < end, f"{pattern!r} is not in {self._unread!r}"
            if select.select([self._screen], [], [], 0.2)[0]:
                self._unread += os.read(self._screen, 4096).decode(errors="replace")
        seen, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return seen

    def leaves(self) -> int:
        return self.process.wait(timeout=WAIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._screen)


def test_a_person_types_interrupts_retries_and_leaves(tmp_path: Path) -> None:
    person = Person(
        "run", "demo", "--ignore-eos", "--seed", "1", "--threads", "1",
        "--dtype", "f32",  # slow enough to be interrupted: the native ops fill the context at once
        HALFBYTE_CACHE=str(tmp_path / "cache"), NO_COLOR="1",
    )  # fmt: skip
    saved = tmp_path / "chat.json"
    try:
        greeting = person.sees(">>> ")
        assert "/help" in greeting
        person.type("What is water?\r")
        person.sees(r"water\?\r?\n\S+ ")
        person.type("\x03")
        first = person.sees(r"\(stopped\)[\s\S]*>>> ")
        assert "Traceback" not in first
        person.type("/retry\r")
        person.sees(r"retry\r?\n\S+ ")
        person.type("\x03")
        person.sees(r"\(stopped\)[\s\S]*>>> ")
        person.type("/set max_tok\t4\r")
        person.sees(r"max_tokens +4\r?\n[\s\S]*>>> ")
        person.type("And fire?\r")
        person.sees(r"fire\?[\s\S]*\n[\s\S]*>>> ")
        person.type(f"/save {saved}\r")
        person.sees("saved 4 messages[\\s\\S]*>>> ")
        person.type("half a line")
        person.sees("half a line")
        person.type("\x03")
        assert "once more" not in person.sees(r"\n[\s\S]*>>> ")
        person.type("\x03")
        person.sees(r"\(once more to leave\)[\s\S]*>>> ")
        person.type("\x03")
        assert person.leaves() == 0
    finally:
        person.close()
    roles = [message["role"] for message in json.loads(saved.read_text())["messages"]]
    assert roles == ["user", "assistant"] * 2
    history = tmp_path / "cache" / "chat_history"
    assert "And fire?" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("quiet", [False, True])
def test_colours_are_for_those_who_want_them(tmp_path: Path, quiet: bool) -> None:
    person = Person(
        "run", "demo", "--max-tokens", "3", "--threads", "1",
        HALFBYTE_CACHE=str(tmp_path), NO_COLOR="1" if quiet else "",
    )  # fmt: skip
    try:
        seen = person.sees(">>> ")
        person.type("/load\r")
        seen += person.sees("error:[\\s\\S]*>>> ")
        person.type("\x04")
        assert person.leaves() == 0
    finally:
        person.close()
    assert ("\x1b[36m" in seen and "\x1b[31m" in seen) is not quiet
