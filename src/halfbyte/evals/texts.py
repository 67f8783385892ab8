"""A text as tokens, cut into the windows that a protocol scores. Integers only.

Two protocols, whose numbers must never be mixed:

- `llama.cpp`: what llama-perplexity does. BOS and the text, cut into whole windows; the first token
  of every window is replaced by BOS; the first half of a window is context only.
- `full`: every window is BOS and the next `window - 1` tokens, all of which are scored. Without a
  BOS a window is `window` tokens, and its first is context only.

A rest that fills no window is not scored. Source of the first: tools/perplexity/perplexity.cpp of
llama.cpp; it wants two windows of text at least, here one will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte.errors import InvalidInputError
from halfbyte.formats.documents import content_of
from halfbyte.text.tokenizer import Tokenizer

Protocol = Literal["llama.cpp", "full"]

# Short texts written for this project, no model's training data: prose, Chinese, code, answers.
OWN = Path(__file__).parent / "builtin"
OWN_TEXTS = {
    name.partition(".")[0]: OWN / name
    for name in ("english.txt", "chinese.txt", "code.txt", "chat.jsonl")
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A named text as token ids, without BOS; `bos` is [BOS], or [] for a model without one."""

    name: str
    token_ids: Sequence[int]
    bos: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What a model reads from position 0. Row `i` predicts `token_ids[i + 1]`.

    Scored are the rows `[first, len(token_ids) - 1)`.
    """

    token_ids: Sequence[int]
    first: int

    @property
    def targets(self) -> Sequence[int]:
        """The tokens that the scored rows predict."""
        return self.token_ids[self.first + 1 :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How texts are cut into windows, and how many of these are read at most."""

    protocol: Protocol = "llama.cpp"
    window: int = 512
    max_windows: int | None = None


def read_text(path: Path, tokenizer: Tokenizer) -> Text:
    """The text of a UTF-8 file; special tokens in it are plain text."""
    ids = tokenizer.encode(content_of(path), special=False)
    return Text(name=path.name, token_ids=ids, bos=tokenizer.with_bos([]))


def cut(text: Text, reading: Reading) -> list[Window]:
    """The windows of a text. Raises `InvalidInputError` if there is none.

    A window is at least 4 tokens: a half of it must hold a token and the one that it predicts.
    """
    window = reading.window
    if window < 4:
        raise InvalidInputError(f"a window has at least 4 tokens, not {window}", where="--window")
    if reading.protocol == "llama.cpp":
        ids, stride, first = [*text.bos, *text.token_ids], window, window // 2
    else:
        ids, stride, first = text.token_ids, window - len(text.bos), 0
    starts = range(0, len(ids) - stride + 1, stride)[: reading.max_windows]
    pieces = [ids[start : start + stride] for start in starts]
    if not pieces:
        raise InvalidInputError(
            f"{len(text.token_ids)} tokens do not fill one window of {window}",
            where=text.name,
            hint="take a longer text, or a smaller --window",
        )
    replaced = stride + len(text.bos) - window  # leading tokens that give way to the BOS
    return [Window(token_ids=[*text.bos, *piece[replaced:]], first=first) for piece in pieces]
