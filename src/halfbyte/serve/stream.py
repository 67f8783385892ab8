"""From the engine's events to what a client is told: text, thought, calls. No input or output.

A step brings an event; an event may complete a piece of text. Stop strings are looked for in what
is said; what may become one is held back, and what follows one is never told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.engine import Completion, Event, Logprobs
from halfbyte.text.answer import AnswerStream, Piece
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import ToolCall

Reason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's string, its bytes of the text, its log-probability, and the likeliest tokens with
    theirs. The first token of a prompt has no probability."""

    token: str
    data: bytes
    logprob: float | None
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What is told at once: some text, said or thought, or a call.

    `drafted` tells of every token since the last delta whether it had been drafted.
    """

    text: str = ""
    thought: str = ""
    call: ToolCall | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    drafted: tuple[bool, ...] = ()


@dataclass(slots=True)
class Told:
    """Everything told of one answer, and how it ended; `stop`: by which stop string, if by one.

    `prompt`: the prompt's own tokens, if their probabilities were wanted.
    """

    text: str = ""
    thought: str = ""
    calls: list[ToolCall] = field(default_factory=list[ToolCall])
    logprobs: list[TokenLogprob] = field(default_factory=list[TokenLogprob])
    prompt: tuple[TokenLogprob, ...] = ()
    reason: Reason | None = None
    stop: str | None = None
    tokens: int = 0
    thought_tokens: int = 0
    first_s: float = 0.0
    completion: Completion | None = None

    def add(self, delta: Delta) -> None:
        """One more delta."""
        self.text += delta.text
        self.thought += delta.thought
        self.logprobs += delta.logprobs
        if delta.call is not None:
            self.calls.append(delta.call)


class Telling:
    """Tells one answer. `single_call`: it ends after a call. `prompt_ids` are named with their
    probabilities, where those come; `mute`: nothing else is told."""

    def __init__(
        self,
        answer: AnswerStream,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        single_call: bool = False,
        prompt_ids: Sequence[int] = (),
        mute: bool = False,
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._stops = Stops(stops)
        self._single_call = single_call
        self._prompt_ids = prompt_ids
        self._mute = mute
        self._logprobs: list[TokenLogprob] = []
        self._drafted: list[bool] = []
        self.told = Told()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be told, whatever comes."""
        return self.told.reason is not None

    def push(self, event: Event) -> Iterator[Delta]:
        """What an event tells. The last one ends the answer, if a stop string has not."""
        if self.ended:
            return
        if self._prompt_ids and not self.told.prompt:
            self.told.prompt = self._prompt(event.prompt_logprobs)
        if self._mute:
            self._end("length")
            return
        if event.token_id is not None:
            self._count(event)
            yield from self._tell(self._answer.push(event.token_id))
        if event.completion is not None and not self.ended:
            yield from self._tell(self._answer.finish())
            if not self.ended:
                yield from self._said(self._stops.rest())
                self._end("length" if event.finish_reason == "length" else "stop")
            if self._logprobs:
                yield self._delta()

    def _count(self, event: Event) -> None:
        assert event.token_id is not None
        self.told.tokens += 1
        self._drafted.append(event.drafted)
        if self._answer.speaking == "thought":
            self.told.thought_tokens += 1
        elif event.logprobs is not None:
            self._logprobs.append(self._named(event.token_id, event.logprobs))

    def _tell(self, pieces: Iterator[Piece]) -> Iterator[Delta]:
        for piece in pieces:
            if piece.kind != "said":
                yield from self._said(self._stops.rest())
            if piece.call is not None:
                yield self._delta(call=piece.call)
                if self._single_call:
                    self._end("stop")
                    return
            elif piece.kind == "thought":
                yield self._delta(thought=piece.text)
            else:
                text, stopped = self._stops.push(piece.text)
                yield from self._said(text)
                if stopped is not None:
                    self.told.stop = stopped
                    self._end("stop")
                    return

    def _said(self, text: str) -> Iterator[Delta]:
        if text:
            yield self._delta(text=text)

    def _delta(self, **what: Any) -> Delta:
        delta = Delta(logprobs=tuple(self._logprobs), drafted=tuple(self._drafted), **what)
        self._logprobs, self._drafted = [], []
        self.told.add(delta)
        return delta

    def _end(self, reason: Reason) -> None:
        self.told.reason = "tool_calls" if self.told.calls else reason

    def _prompt(self, found: Sequence[Logprobs]) -> tuple[TokenLogprob, ...]:
        first, *others = self._prompt_ids
        begin = TokenLogprob(
            self._word(first)[0], self._tokenizer.token_bytes(first, skip_special=True), None
        )
        return (begin, *(self._named(*it) for it in zip(others, found, strict=True)))

    def _named(self, token_id: int, found: Logprobs) -> TokenLogprob:
        top = tuple((*self._word(index), logprob) for index, logprob in found.top)
        data = self._tokenizer.token_bytes(token_id, skip_special=True)
        return TokenLogprob(self._word(token_id)[0], data, found.logprob, top)

    def _word(self, token_id: int) -> tuple[str, bytes]:
        data = self._tokenizer.token_bytes(token_id, skip_special=False)
        return data.decode(errors="replace"), data


class Stops:
    """Finds stop strings in text that comes in parts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be told, and the stop string that was found behind it."""
        text = self._held + text
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            place, stop = min(places)
            return text[:place], stop
        begun = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun], None

    def rest(self) -> str:
        """What was held back and has become no stop string."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if stop.startswith(text[-size:])), 0)
