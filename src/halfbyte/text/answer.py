"""An answer as it comes: ids in, pieces out, divided into what is said, thought and called.

A state machine without input or output of its own, the only one: an answer that is read at once
goes through it too, so streaming cannot differ. The laws:

    * an answer without marks is the decoding of its ids, to the last space;
    * white space around a thought is not shown, nor any beside a mark that begins or ends what is
      said;
    * a call comes as one piece, when it is complete; one that does not follow its dialect's grammar
      comes as the text that it is, with a note; nothing that a model writes raises an error;
    * a thought that the prompt has opened is known from the prompt; one that is not closed is
      thought to the end; a second one begins on a new line.

The price: white space is shown with what follows it, and where a call may begin without a mark
(Llama 3, tools offered) an answer that begins with a brace is shown at its end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from halfbyte.text.grammar import Grammar, Mark
from halfbyte.text.stream import StreamDecoder
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import MAX_BODY_CHARACTERS, QUOTE, MalformedCallError, ToolCall

_PROMPT_TAIL = 16  # ids; more than the end of a prompt that opens a thought takes

Kind = Literal["said", "thought", "call"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, said or thought, never empty; or a call, whose text is empty.

    `note` says why a text that looks like a call is none.
    """

    text: str
    kind: Kind = "said"
    call: ToolCall | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says, what it thought before, and what it wants called; "" for nothing."""

    text: str
    thought: str
    calls: tuple[ToolCall, ...] = ()
    notes: tuple[str, ...] = ()

    def message(self) -> dict[str, Any]:
        """The answer as a message of the conversation that goes on.

        The thought stays only beside calls, whose results are still part of the same turn.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.calls:
            message["tool_calls"] = [
                _as_function(index, call) for index, call in enumerate(self.calls)
            ]
            if self.thought:
                message["reasoning_content"] = self.thought
        return message


def collected(pieces: Iterable[Piece]) -> Answer:
    """The answer that the pieces make."""
    found = list(pieces)
    return Answer(
        text="".join(piece.text for piece in found if piece.kind == "said"),
        thought="".join(piece.text for piece in found if piece.kind == "thought"),
        calls=tuple(piece.call for piece in found if piece.call is not None),
        notes=tuple(piece.note for piece in found if piece.note is not None),
    )


class AnswerStream:
    """Divides one answer. `prompt_ids` are those it follows.

    `continues_text`: it goes on with the prompt's own text, whose last space belongs to it.
    `tools`: tools were offered, so letters may be a call where the vocabulary has no mark for one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        grammar: Grammar,
        prompt_ids: Sequence[int] = (),
        *,
        continues_text: bool = False,
        tools: bool = False,
    ) -> None:
        self._grammar = grammar
        self._decoder = StreamDecoder(tokenizer)
        for token_id in prompt_ids if continues_text else ():
            self._decoder.push(token_id)
        self._letters = _Letters(grammar.texts(tools=tools))
        self._bare = tools and grammar.dialect is not None and grammar.dialect.bare
        self._said, self._thought = _Voice("said"), _Voice("thought")
        self._speaking = self._said
        self._body: _Body | None = None
        self._heading: str | None = None
        if opens_thought(tokenizer, grammar, prompt_ids):
            self._speaking, self._heading = self._thought, ""
            self._said.touch()

    @property
    def speaking(self) -> Kind:
        """What is being written now."""
        if self._body is not None:
            return "call"
        return "thought" if self._speaking is self._thought else "said"

    def push(self, token_id: int) -> Iterator[Piece]:
        """The pieces that this token completes."""
        mark = self._grammar.ids.get(token_id)
        if mark is None:
            yield from self._read(self._decoder.push(token_id))
        else:
            yield from self._flush()
            yield from self._turn(mark)

    def finish(self) -> Iterator[Piece]:
        """What was held back."""
        yield from self._flush()
        yield from self._end_call(closed=False)
        yield from self._said.rest()

    def _flush(self) -> Iterator[Piece]:
        yield from self._read(self._decoder.finish())
        yield from self._take(self._letters.rest())

    def _read(self, text: str) -> Iterator[Piece]:
        for part in self._letters.divide(text):
            yield from self._turn(part) if isinstance(part, Mark) else self._take(part)

    def _turn(self, mark: Mark) -> Iterator[Piece]:
        """What a mark ends and begins. One that makes no sense where it stands is dropped."""
        if mark is Mark.QUOTE:
            yield from self._take(QUOTE if self._body else "")
            return
        yield from self._end_call(closed=mark is Mark.CALL_CLOSES)
        self._said.touch()
        if mark is Mark.CALL_OPENS:
            assert self._grammar.dialect is not None
            self._body = _Body(self._grammar.dialect.opens)
        elif mark is Mark.THOUGHT_OPENS:
            self._thought.begin()
            self._heading = ""
            self._speaking = self._thought
        elif mark is Mark.THOUGHT_CLOSES:
            self._speaking = self._said

    def _take(self, text: str) -> Iterator[Piece]:
        """Text between marks."""
        if self._body is None and self._begins_bare_call(text):
            self._body = _Body("")
        if self._body is None:
            yield from self._speak(text)
        elif not self._body.add(text):
            yield from self._as_text(f"it is longer than {MAX_BODY_CHARACTERS} characters")

    def _begins_bare_call(self, text: str) -> bool:
        first = self._bare and self._speaking is self._said and not self._said.began
        return first and text.lstrip().startswith("{")

    def _speak(self, text: str) -> Iterator[Piece]:
        if self._speaking is self._thought:
            text = self._without_heading(text)
        return self._speaking.speak(text)

    def _without_heading(self, text: str) -> str:
        if self._heading is None or self._grammar.thoughts is None:
            return text
        line = self._grammar.thoughts.heading + "\n"
        self._heading += text
        if len(self._heading) < len(line) and line.startswith(self._heading):
            return ""
        text, self._heading = self._heading.removeprefix(line), None
        return text

    def _end_call(self, *, closed: bool) -> Iterator[Piece]:
        """Ends the call that is under way, if one is: as calls, or as the text that it is."""
        body, dialect = self._body, self._grammar.dialect
        if body is None or dialect is None:
            return
        try:
            calls = dialect.parse(body.text)
        except MalformedCallError as error:
            yield from self._as_text(str(error), (dialect.closes or "") if closed else "")
            return
        self._body = None
        self._said.touch()
        yield from (Piece("", "call", call) for call in calls)

    def _as_text(self, reason: str, closing: str = "") -> Iterator[Piece]:
        assert self._body is not None and self._grammar.dialect is not None
        body, self._body = self._body, None
        text = body.opening + body.text.replace(QUOTE, self._grammar.dialect.quote or "") + closing
        note = f"this looks like a tool call, but {reason}" if body.opening else None
        yield from (replace(piece, note=note) for piece in self._speaking.speak(text))


class _Body:
    """A call under way, bounded."""

    def __init__(self, opening: str) -> None:
        self.opening = opening
        self._parts: list[str] = []
        self._size = 0

    def add(self, text: str) -> bool:
        """False when it has become too long."""
        self._parts.append(text)
        self._size += len(text)
        return self._size <= MAX_BODY_CHARACTERS

    @property
    def text(self) -> str:
        return "".join(self._parts)


class _Voice:
    """Text of one kind. White space is held until it is known whether something follows it."""

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._held = ""
        self._trims_start = kind == "thought"
        self._trims_end = False
        self.began = False

    def touch(self) -> None:
        """A mark stands here."""
        self._trims_start = not self.began
        self._trims_end = True

    def begin(self) -> None:
        """A further stretch begins, on a new line."""
        self._held = ""
        self._trims_start = True

    def speak(self, text: str) -> Iterator[Piece]:
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if not shown:
            return
        if self._trims_start:
            shown = ("\n" if self.began else "") + shown.lstrip()
        self.began = True
        self._trims_start = self._trims_end = False
        yield Piece(shown, self._kind)

    def rest(self) -> Iterator[Piece]:
        """The white space at the end, unless a mark stands beside it."""
        if self._held and not self._trims_end:
            yield Piece(self._held, self._kind)


class _Letters:
    """Finds the marks that are no tokens in text that comes in parts."""

    def __init__(self, marks: dict[str, Mark]) -> None:
        self._marks = marks
        self._pattern = re.compile("|".join(map(re.escape, marks)))
        self._unread = ""

    def divide(self, text: str) -> Iterator[str | Mark]:
        """Text and marks in their order; what may become a mark is held back."""
        if not self._marks:
            yield text
            return
        self._unread += text
        while found := self._pattern.search(self._unread):
            before, self._unread = self._unread[: found.start()], self._unread[found.end() :]
            yield before
            yield self._marks[found[0]]
        cut = len(self._unread) - self._held()
        certain, self._unread = self._unread[:cut], self._unread[cut:]
        yield certain

    def rest(self) -> str:
        """What was held back and has become no mark."""
        rest, self._unread = self._unread, ""
        return rest

    def _held(self) -> int:
        """The length of the longest end of the text that is the beginning of a mark."""
        beginnings = (mark[:size] for mark in self._marks for size in range(1, len(mark)))
        return max((len(b) for b in beginnings if self._unread.endswith(b)), default=0)


def opens_thought(tokenizer: Tokenizer, grammar: Grammar, prompt_ids: Sequence[int]) -> bool:
    """Whether a prompt ends in an open thought: its mark, with or without the heading."""
    if grammar.thoughts is None:
        return False
    tail = tokenizer.decode(prompt_ids[-_PROMPT_TAIL:], skip_special=False).rstrip()
    tail = tail.removesuffix(grammar.thoughts.heading)
    return tail.rstrip().endswith(grammar.thoughts.opens)


def _as_function(index: int, call: ToolCall) -> dict[str, Any]:
    # Nine letters and digits: some templates insist.
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call{index:05d}", "type": "function", "function": function}
