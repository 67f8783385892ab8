"""Answers in every dialect. The first byte picks the model, and then each byte is a token.

Letters are below 128, the models' marks above.
"""

from __future__ import annotations

import json
from functools import cache

from halfbyte.text.answer import AnswerStream, collected
from halfbyte.text.assets import assets_from_metadata
from halfbyte.text.grammar import THOUGHTS, Grammar, grammar_of
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.tools import DIALECTS

MARKS = sorted(
    {mark for dialect in DIALECTS for mark in dialect.marks}
    | {mark for thoughts in THOUGHTS for mark in (thoughts.opens, thoughts.closes)}
)
LETTERS = [chr(0x100 + code) if code < 33 else chr(code) for code in range(127)]


@cache
def models() -> list[tuple[Tokenizer, Grammar]]:
    """Every dialect, in a vocabulary that has all the marks and in one that has none."""
    spelled = [dialect.opens + thoughts.closes for dialect in DIALECTS for thoughts in THOUGHTS]
    tokenizers = [_tokenizer(MARKS), _tokenizer([])]
    return [
        (tokenizer, grammar_of(tokenizer, text)) for tokenizer in tokenizers for text in spelled
    ]


def _tokenizer(marks: list[str]) -> Tokenizer:
    tokens = [*LETTERS, *marks, "\u00f0"]  # the last is a byte that begins a character
    assets = assets_from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.token_type": [3 if token in marks else 1 for token in tokens],
        }
    )
    assert assets is not None
    return Tokenizer(assets)


def one_input(data: bytes) -> None:
    first = data[0] if data else 0
    tokenizer, grammar = models()[first % len(models())]
    ids = [value % tokenizer.vocab_size for value in data[1:]]
    stream = AnswerStream(tokenizer, grammar, ids[:3], tools=first >= 128)
    pieces = [piece for token_id in ids for piece in stream.push(token_id)]
    answer = collected([*pieces, *stream.finish()])
    json.dumps(answer.message(), ensure_ascii=False, allow_nan=False).encode()
    assert all(piece.text or piece.call for piece in pieces)
