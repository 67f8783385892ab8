"""A vocabulary from Hugging Face's tokenizer.json: recognised part by part, or refused.

tokenizer.json describes a pipeline (normalizer, pre-tokenizer, model, decoder); a vocabulary of
ours has a kind. Each kind is recognised by the parts it is made of, and parts that would change
the ids and have no place in a kind raise an UnsupportedError that names them.

Source: the file format of huggingface/tokenizers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from halfbyte.errors import IntegrityError, UnsupportedError
from halfbyte.text.splitters import pre_of_pattern, splitter_of
from halfbyte.text.vocabulary import (
    MAX_TOKENS,
    SPACE,
    UNREACHABLE,
    SpacePrefix,
    TokenType,
    Vocabulary,
)

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def vocabulary_from_tokenizer_json(
    document: Mapping[str, Any], *, num_rows: int | None
) -> Vocabulary:
    """The vocabulary of a parsed tokenizer.json.

    `num_rows`: the rows of the embedding (config.json's vocab_size); ids without a token up to
    there become unused tokens "[PAD7]", because a GGUF has one token per row.
    """
    try:
        return _vocabulary(document, num_rows)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(
            f"not a tokenizer description ({type(error).__name__}: {error})",
            where="tokenizer.json",
        ) from error


def leading_token(document: Mapping[str, Any]) -> str | None:
    """The special token that the post-processor puts before a text, if any."""
    for part in _flat(document.get("post_processor"), "processors"):
        if part.get("type") == "TemplateProcessing" and part.get("single"):
            return part["single"][0].get("SpecialToken", {}).get("id")
    return None


def _vocabulary(document: Mapping[str, Any], num_rows: int | None) -> Vocabulary:
    model = document["model"]
    if model.get("type", "BPE") != "BPE":
        raise _refused(f"a {model['type']} model")
    tokens = _tokens(document, num_rows)
    types = _types(document, tokens)
    merges = _merges(model)
    if not model.get("byte_fallback"):
        return Vocabulary(
            model="gpt2", tokens=tokens, types=types, merges=merges, pre=_pre(document)
        )
    prefix = _space_prefix(document)
    if prefix == "never":
        return Vocabulary(model="gemma4", tokens=tokens, types=types, merges=merges)
    scores = _scores(tokens, merges)
    return Vocabulary(model="llama", tokens=tokens, types=types, scores=scores, space_prefix=prefix)


def _tokens(document: Mapping[str, Any], num_rows: int | None) -> tuple[str, ...]:
    by_id = {index: token for token, index in document["model"]["vocab"].items()}
    for added in document.get("added_tokens") or ():
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise _refused(f"the added token {added['content']!r} with a strip or word rule")
        by_id[added["id"]] = added["content"]
    rows = num_rows or max(by_id) + 1
    if min(by_id) < 0 or max(by_id) >= min(rows, MAX_TOKENS):
        raise IntegrityError(
            f"the token id {max(by_id)} is outside the {rows} rows of the embedding",
            where="tokenizer.json",
        )
    return tuple(by_id.get(index, f"[PAD{index}]") for index in range(rows))


def _types(document: Mapping[str, Any], tokens: Sequence[str]) -> tuple[int, ...]:
    model = document["model"]
    types = dict.fromkeys(model["vocab"], TokenType.NORMAL)
    if model.get("byte_fallback"):
        types |= {token: TokenType.BYTE for token in types if BYTE_TOKEN.fullmatch(token)}
    for added in document.get("added_tokens") or ():
        special = added.get("special")
        types[added["content"]] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    if model.get("unk_token") is not None:
        types[model["unk_token"]] = TokenType.UNKNOWN
    return tuple(int(types.get(token, TokenType.UNUSED)) for token in tokens)


def _merges(model: Mapping[str, Any]) -> tuple[str, ...]:
    """The merges as "left right". Parts with a space of their own never occur in a text whose
    spaces are replaced before merging, so they are left out."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return tuple(f"{left} {right}" for left, right in pairs if " " not in left + right)


def _scores(tokens: Sequence[str], merges: Sequence[str]) -> tuple[float, ...]:
    """SentencePiece scores that order the pieces as their first merges do."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    return tuple(
        float(-ranks[token]) if token in ranks else 0.0 if len(token) == 1 else UNREACHABLE
        for token in tokens
    )


def _space_prefix(document: Mapping[str, Any]) -> SpacePrefix:
    """How a byte-fallback pipeline treats spaces; every part must be a known one."""
    prefix: SpacePrefix = "never"
    replaced = False
    for part in _flat(document.get("normalizer"), "normalizers"):
        match part:
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaced = True
            case {"type": "Prepend", "prepend": "▁"} if not replaced:
                prefix = "always"
            case _:
                raise _refused(f"the normalizer {part.get('type')}")
    for part in _flat(document.get("pre_tokenizer"), "pretokenizers"):
        match part:
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                pass  # no space is left to split at
            case {"type": "Metaspace", "prepend_scheme": "first" | "never" as scheme} if (
                not replaced and not part.get("split", True) and part.get("replacement") == SPACE
            ):
                prefix, replaced = scheme, True
            case _:
                raise _refused(f"the pre-tokenizer {part.get('type')}")
    if not replaced:
        raise _refused("byte fallback without replaced spaces")
    return prefix


def _pre(document: Mapping[str, Any]) -> str:
    """The name of the word splitter of a byte-level pipeline."""
    match _flat(document.get("pre_tokenizer"), "pretokenizers"):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get(
            "use_regex", True
        ):
            pre = "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            pre = "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pre = pre_of_pattern(pattern)
        case parts:
            raise _refused("the pre-tokenizer " + ", ".join(str(p.get("type")) for p in parts))
    if pre is None:
        raise _refused("an unknown regex in the pre-tokenizer")
    _check_byte_level(document, pre)
    return pre


def _check_byte_level(document: Mapping[str, Any], pre: str) -> None:
    splitter = splitter_of(pre)
    normalizers = [part["type"] for part in _flat(document.get("normalizer"), "normalizers")]
    if normalizers != (["NFC"] if splitter.compose else []):
        raise _refused(f"the normalizers {normalizers} with the splitter {pre}")
    if bool(document["model"].get("ignore_merges")) != splitter.whole_words:
        raise _refused(f"another ignore_merges than the splitter {pre} has")


def _flat(part: Any, key: str) -> list[Any]:
    """A part of the pipeline as a list: nothing, one, or the members of a Sequence."""
    if part is None:
        return []
    return list(part[key]) if part.get("type") == "Sequence" else [part]


def _refused(found: str) -> UnsupportedError:
    return UnsupportedError(
        f"this tokenizer uses {found}",
        where="tokenizer.json",
        hint="a GGUF of the same model may carry it in a form that runs",
    )
