"""A vocabulary from GGUF metadata (tokenizer.ggml.*), and back.

What is written here llama.cpp reads and tokenizes as we do. Two of its habits are undone on the
way in: an empty token is called [EMPTY_5], and Gemma 4's tokens for channels and tools are typed
"user defined" in files, because its chat parser reads text; they are control tokens for us, whose
parsers read ids.

Source: the GGUF specification; llama.cpp's llama-vocab.cpp and conversion scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.text import fields
from halfbyte.text.splitters import splitter_of
from halfbyte.text.vocabulary import MAX_MERGES, MAX_TOKENS, TokenType, Vocabulary

PREFIX = "tokenizer.ggml."
GEMMA4_VISIBLE = frozenset(
    {
        "<|channel>",
        "<channel|>",
        "<|tool_call>",
        "<tool_call|>",
        "<|tool_response>",
        "<tool_response|>",
        '<|"|>',
    }
)
# What converters write for pieces that no score orders.
_NO_SCORE = -1000.0


def vocabulary_from_metadata(metadata: Mapping[str, Any]) -> Vocabulary | None:
    """The vocabulary of a GGUF header, None if it has none.

    Raises UnsupportedError for a kind or word splitter that we do not run, IntegrityError for
    missing, ill-typed or oversized fields.
    """
    model = fields.text(metadata, PREFIX + "model")
    if model is None or model in ("none", "no_vocab"):
        return None
    if model not in ("llama", "gemma4", "gpt2"):
        raise UnsupportedError(
            f"the tokenizer kind {model[:60]!r} is not supported",
            where=PREFIX + "model",
            hint="known: llama, gemma4, gpt2",
        )
    tokens = _tokens(metadata)
    pre = fields.text(metadata, PREFIX + "pre") or "default"
    if model == "gpt2":
        splitter_of(pre)
    return Vocabulary(
        model=model,
        tokens=tokens,
        types=_types(metadata, tokens, gemma4=model == "gemma4"),
        scores=_scores(metadata) if model == "llama" else (),
        merges=_merges(metadata) if model != "llama" else (),
        pre=pre if model == "gpt2" else "default",
        space_prefix="always" if _adds_space(metadata, model) else "never",
    )


def vocabulary_to_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer.ggml.* keys of this vocabulary.

    GGUF has no word for a space prefix at the first stretch only; it becomes the plain one.
    """
    values: dict[str, Any] = {
        "model": vocabulary.model,
        "tokens": list(vocabulary.tokens),
        "token_type": _file_types(vocabulary),
        "add_space_prefix": vocabulary.space_prefix != "never",
    }
    if vocabulary.model == "llama":
        values |= {"pre": "default", "scores": list(vocabulary.scores)}
    else:
        values |= {"merges": list(vocabulary.merges)}
    if vocabulary.model == "gpt2":
        values |= {"pre": vocabulary.pre}
    if vocabulary.model == "gemma4":
        values |= {"scores": [_NO_SCORE] * len(vocabulary.tokens)}
    return {PREFIX + key: value for key, value in values.items()}


def _tokens(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    tokens = fields.items(metadata, PREFIX + "tokens", str, MAX_TOKENS)
    if not tokens:
        raise IntegrityError(f"the field '{PREFIX}tokens' is missing or empty")
    return tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(tokens))


def _types(
    metadata: Mapping[str, Any], tokens: tuple[str, ...], *, gemma4: bool
) -> tuple[int, ...]:
    types = fields.items(metadata, PREFIX + "token_type", int, MAX_TOKENS)
    if types is None:
        types = [int(TokenType.NORMAL)] * len(tokens)
    if gemma4:
        return tuple(
            int(TokenType.CONTROL) if token in GEMMA4_VISIBLE else kind
            for token, kind in zip(tokens, types, strict=False)
        )
    return tuple(types)


def _file_types(vocabulary: Vocabulary) -> list[int]:
    if vocabulary.model != "gemma4":
        return list(vocabulary.types)
    return [
        int(TokenType.USER_DEFINED) if token in GEMMA4_VISIBLE else kind
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
    ]


def _scores(metadata: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(fields.items(metadata, PREFIX + "scores", float, MAX_TOKENS) or ())


def _merges(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    merges = fields.items(metadata, PREFIX + "merges", str, MAX_MERGES)
    if merges is None:
        raise IntegrityError(f"the field '{PREFIX}merges' is missing")
    return tuple(merges)


def _adds_space(metadata: Mapping[str, Any], model: str) -> bool:
    stated = fields.flag(metadata, PREFIX + "add_space_prefix")
    return model == "llama" and stated is not False
