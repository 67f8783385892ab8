"""Text to token ids and back, for any vocabulary.

A token stands for bytes, and a text is the UTF-8 reading of its tokens' bytes: decoding is defined
on bytes, so that a text decoded at once and one decoded token by token (stream.py) are the same.
Bytes that are no UTF-8 become U+FFFD.

Not here: chat templates (chat.py). Encoding runs in the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from halfbyte.errors import InvalidInputError
from halfbyte.text.assets import TextAssets
from halfbyte.text.backend import encoders
from halfbyte.text.huggingface import BYTE_TOKEN
from halfbyte.text.vocabulary import SPACE, TokenType


class Tokenizer:
    """Encodes and decodes with one model's vocabulary. Safe to share between threads."""

    def __init__(self, assets: TextAssets) -> None:
        vocabulary = assets.vocabulary
        self._plain, self._parsing = encoders(vocabulary, assets.unk_id)
        self._byte_level = vocabulary.model == "gpt2"
        self._silent = frozenset(
            vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED)
        )
        self._adds_bos = assets.add_bos and assets.bos_id is not None
        self.bos_id = assets.bos_id
        self.vocab_size = len(vocabulary.tokens)
        self.strips_space = vocabulary.space_prefix != "never"

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text, without BOS.

        `special`: strings like "<|turn>" become the control tokens they name; otherwise they are
        plain text.
        """
        encoder = self._parsing if special else self._plain
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                f"the text has half a character (a lone surrogate) at {error.start}",
                hint="read the text as UTF-8",
            ) from error
        return encoder.encode(text, add_special_tokens=False).ids

    def encode_raw(self, text: str, *, special: bool = True) -> list[int]:
        """One BOS, if the model's texts begin with one, and the text."""
        return self.with_bos(self.encode(text, special=special))

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with exactly one BOS in front, or as they are for a model that uses none."""
        bos = self.bos_id
        if not self._adds_bos or bos is None:
            return ids
        start = next((i for i, token_id in enumerate(ids) if token_id != bos), len(ids))
        return [bos, *ids[start:]]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of the ids; the space that encoding puts in front is taken away again."""
        data = b"".join(self.token_bytes(i, skip_special=skip_special) for i in ids)
        if self.strips_space:
            data = data.removeprefix(b" ")
        return data.decode(errors="replace")

    def token_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """The bytes that a token stands for; none for a special one if those are skipped."""
        token = self.token(token_id)
        if token_id in self._silent:
            return b"" if skip_special else token.encode()
        if self._byte_level:
            return _byte_level_bytes(token)
        if BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def token(self, token_id: int) -> str:
        """The vocabulary's string for an id."""
        if not 0 <= token_id < self.vocab_size:
            raise InvalidInputError(
                f"the token id {token_id} is outside the vocabulary of {self.vocab_size}"
            )
        found = self._plain.id_to_token(token_id)
        assert found is not None, token_id
        return found

    def token_id(self, string: str) -> int | None:
        """The id of exactly this token, None if there is none."""
        return self._plain.token_to_id(string)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is no part of a text: control, unknown or unused."""
        return token_id in self._silent


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's stand-ins: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
