"""A `tokenizers` encoder for a vocabulary: the pipeline of each kind, in the library's own parts.

Two encoders share one model, so that special-token strings can be parsed or taken as plain text
without changing state between calls (and without a second copy of the merges).
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from halfbyte.errors import IntegrityError
from halfbyte.text.splitters import Splitter, splitter_of
from halfbyte.text.vocabulary import SPACE, TokenType, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE


def encoders(vocabulary: Vocabulary, unk_id: int | None) -> tuple[Encoder, Encoder]:
    """(special-token strings are plain text, special-token strings are parsed)."""
    from tokenizers import Tokenizer as Encoder

    model = _model(vocabulary, unk_id)
    plain, parsing = Encoder(model), Encoder(model)
    for encoder in (plain, parsing):
        _set_pipeline(encoder, vocabulary)
        _add(encoder, vocabulary, special=False)
    _add(parsing, vocabulary, special=True)
    return plain, parsing


def _model(vocabulary: Vocabulary, unk_id: int | None) -> BPE:
    from tokenizers.models import BPE

    spaced = vocabulary.model != "gpt2"
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    merges = vocabulary.merge_pairs()
    # The library panics at some merges that do not fit, so they are looked at first.
    if not all(map(ids.__contains__, chain(map("".join, merges), chain.from_iterable(merges)))):
        left, right = next(pair for pair in merges if not {*pair, "".join(pair)} <= ids.keys())
        raise _misfit(f"{left[:40]!r} and {right[:40]!r}")
    try:
        return BPE(
            vocab=ids,
            merges=merges,
            unk_token=vocabulary.tokens[unk_id] if spaced and unk_id is not None else None,
            fuse_unk=spaced,
            byte_fallback=spaced,
            ignore_merges=not spaced and splitter_of(vocabulary.pre).whole_words,
        )
    except Exception as error:  # the library raises bare Exceptions
        raise _misfit(error) from error


def _misfit(what: object) -> IntegrityError:
    return IntegrityError(f"the merges do not fit the tokens ({what})", where="tokenizer")


def _set_pipeline(encoder: Encoder, vocabulary: Vocabulary) -> None:
    from tokenizers import normalizers, pre_tokenizers

    if vocabulary.model == "gpt2":
        _set_byte_level(encoder, splitter_of(vocabulary.pre))
    elif vocabulary.space_prefix == "first":
        encoder.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            replacement=SPACE, prepend_scheme="first", split=False
        )
    else:
        replace = normalizers.Replace(" ", SPACE)
        prepend = [normalizers.Prepend(SPACE)] if vocabulary.space_prefix == "always" else []
        encoder.normalizer = normalizers.Sequence([*prepend, replace])  # type: ignore[assignment]


def _set_byte_level(encoder: Encoder, splitter: Splitter) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    if splitter.compose:
        encoder.normalizer = normalizers.NFC()  # type: ignore[assignment]
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in splitter.patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])  # type: ignore[assignment]


def _add(encoder: Encoder, vocabulary: Vocabulary, *, special: bool) -> None:
    """Tokens that are matched in the text before anything else."""
    from tokenizers import AddedToken

    kinds = (TokenType.CONTROL, TokenType.UNKNOWN) if special else (TokenType.USER_DEFINED,)
    tokens = [
        AddedToken(vocabulary.tokens[index], normalized=False, special=special)
        for index in vocabulary.ids_of(*kinds)
    ]
    encoder.add_tokens(tokens)
