"""An answer as it comes: ids in, pieces of text out, thoughts told apart from what is said.

The same division as `Chat.split`, made id by id. A thought channel begins with its name on a line
of its own, which is not shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from halfbyte.text.stream import StreamDecoder
from halfbyte.text.tokenizer import Tokenizer

THOUGHT_OPENS, THOUGHT_CLOSES = "<|channel>", "<channel|>"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text, never empty; whether it is said or thought."""

    text: str
    thought: bool = False


class AnswerStream:
    """Decodes one answer. `prompt_ids` are those it continues, if it continues a text."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._opens = tokenizer.token_id(THOUGHT_OPENS)
        self._closes = tokenizer.token_id(THOUGHT_CLOSES)
        self._decoder = StreamDecoder(tokenizer)
        for token_id in prompt_ids:
            self._decoder.push(token_id)
        self._thinking = False
        self._heading: str | None = None

    def push(self, token_id: int) -> Iterator[Piece]:
        """The pieces that this token completes."""
        if token_id not in (self._opens, self._closes):
            yield from self._piece(self._decoder.push(token_id))
            return
        yield from self.finish()
        self._thinking = token_id == self._opens
        self._heading = "" if self._thinking else None
        self._decoder = StreamDecoder(self._tokenizer)

    def finish(self) -> Iterator[Piece]:
        """What was held back."""
        yield from self._piece(self._decoder.finish())

    def _piece(self, text: str) -> Iterator[Piece]:
        if self._heading is not None:
            self._heading += text
            _, newline, text = self._heading.partition("\n")
            if not newline:
                return
            self._heading = None
        if text:
            yield Piece(text, self._thinking)
