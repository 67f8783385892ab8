"""A vocabulary as plain values: tokens, their types, and what decides which pairs merge.

Three kinds cover the models we run, under the names that GGUF uses. All are byte-pair encoders:

    llama    pieces with scores (SentencePiece); the best score merges first; bytes as <0x0A>
    gemma4   pieces with an ordered list of merges; bytes as <0x0A>
    gpt2     byte-level: every byte has a printable stand-in; words are cut by a regex (`pre`)

Hugging Face's tokenizer.json and GGUF metadata are both reduced to this, and everything else is
built from it, so the file kind cannot change the ids. The price: a tokenizer.json with parts that
these kinds do not have is refused instead of being run as it is.

Not here: encoding and decoding (tokenizer.py).
Sources: the GGUF specification (tokenizer.ggml.*); Kudo and Richardson 2018 (SentencePiece).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from halfbyte.errors import IntegrityError

MAX_TOKENS = 2**21
MAX_MERGES = 2**22
MAX_TOKEN_CHARACTERS = 1024
# The score of a piece that is never merged into; Llama 2 itself uses scores down to -1e9.
UNREACHABLE = -(2.0**100)
SPACE = "▁"  # stands for a space in the pieces of llama and gemma4

Model = Literal["llama", "gemma4", "gpt2"]
SpacePrefix = Literal["never", "first", "always"]


class TokenType(IntEnum):
    """GGUF's tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The tokens in id order, with a type each.

    `scores`: one per token (llama). `merges`: "left right", best first (gemma4, gpt2).
    `pre`: the name of the word splitter (gpt2). `space_prefix`: whether a space is put before a
    text: before every stretch between special tokens ("always"), or only at the very beginning
    and only if there is none ("first").
    """

    model: Model
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    pre: str = "default"
    space_prefix: SpacePrefix = "never"

    def __post_init__(self) -> None:
        _require(0 < len(self.tokens) <= MAX_TOKENS, f"{len(self.tokens)} tokens")
        _require(len(self.merges) <= MAX_MERGES, f"{len(self.merges)} merges")
        _require(len(self.types) == len(self.tokens), f"{len(self.types)} token types")
        _require(set(self.types) <= set(TokenType), "a token type outside 1..6")
        _require(max(map(len, self.tokens)) <= MAX_TOKEN_CHARACTERS, "a token that is too long")
        _require(all(self.tokens), "an empty token")
        _require(len(set(self.tokens)) == len(self.tokens), "the same token twice")
        if self.model == "llama":
            _require(len(self.scores) == len(self.tokens), f"{len(self.scores)} scores")

    def ids_of(self, *types: TokenType) -> list[int]:
        """The ids of these types, in order."""
        return [index for index, kind in enumerate(self.types) if kind in types]

    def merge_pairs(self) -> list[tuple[str, str]]:
        """The merges as pairs, best first; for llama they are derived from the scores."""
        if self.model == "llama":
            return _pairs_from_scores(self)
        return [_pair(merge) for merge in self.merges]


def _pair(merge: str) -> tuple[str, str]:
    # The space is searched behind the first character, which may itself be one.
    cut = merge.find(" ", 1)
    _require(0 < cut < len(merge) - 1, f"the merge {merge[:40]!r}")
    return merge[:cut], merge[cut + 1 :]


def _pairs_from_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, ordered by the score of the piece.

    SentencePiece merges the pair whose piece has the best score, the leftmost among equals. Ranks
    cannot tie, so among the ways to make one piece the longest left part goes first: ways that
    compete for the same letters lie in a run ("----"), where parts shrink from left to right.
    """
    ranked = [
        (-vocabulary.scores[index], index, token)
        for index, token in enumerate(vocabulary.tokens)
        if vocabulary.types[index] == TokenType.NORMAL
    ]
    work = sum(len(token) ** 2 for _, _, token in ranked)
    _require(work < 2**31, "tokens that are too long to be split")
    pieces = {token for _, _, token in ranked}
    return [
        pair
        for negative, _, token in sorted(ranked)
        if negative < -UNREACHABLE
        for pair in _splits(token, pieces)
    ]


def _splits(token: str, pieces: set[str]) -> Iterator[tuple[str, str]]:
    for cut in range(len(token) - 1, 0, -1):
        left, right = token[:cut], token[cut:]
        if left in pieces and right in pieces:
            yield left, right


def _require(good: bool, found: str) -> None:
    if not good:
        raise IntegrityError(f"the vocabulary has {found}", where="tokenizer")
