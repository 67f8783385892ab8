"""Token ids in, text out as soon as it is certain: never half a character.

Joined, the pieces equal `Tokenizer.decode` of all the ids, however they are cut: a token gives
bytes, and an incremental UTF-8 decoder holds back the bytes of an unfinished character.

To continue a prompt (where a leading space is part of the text), push the prompt's ids first and
drop what comes out.
"""

from __future__ import annotations

import codecs

from halfbyte.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes one sequence. One per answer; not to be shared."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.strips_space

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        data = self._tokenizer.token_bytes(token_id, skip_special=self._skip_special)
        if self._at_start and data:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._characters.decode(data)

    def finish(self) -> str:
        """What is held back, as U+FFFD; a new character begins."""
        return self._characters.decode(b"", final=True)
