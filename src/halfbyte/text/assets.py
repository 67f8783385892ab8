"""Everything about text that a model carries: vocabulary, special ids, template, defaults.

Read from a Hugging Face directory or from GGUF metadata alone, written as GGUF metadata; all
three give the same value, so nothing above knows which file it was. Metadata is untrusted: sizes
are capped, a wrong type or an id outside the vocabulary is an IntegrityError that names the key.

Loads without torch, tokenizers or jinja2.
Source: the GGUF specification; the file layout of Hugging Face models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from halfbyte.errors import IntegrityError
from halfbyte.text import fields
from halfbyte.text.generation import (
    GenerationDefaults,
    defaults_from_config,
    defaults_from_metadata,
    defaults_to_metadata,
)
from halfbyte.text.huggingface import leading_token, vocabulary_from_tokenizer_json
from halfbyte.text.metadata import PREFIX, vocabulary_from_metadata, vocabulary_to_metadata
from halfbyte.text.splitters import splitter_of
from halfbyte.text.vocabulary import MAX_TOKENS, TokenType, Vocabulary

# One of 2**20 took seconds and two gigabytes to compile; this takes less than a second.
MAX_TEMPLATE_CHARACTERS = 2**16
MAX_JSON_BYTES = 2**28

# GGUF names one end of text and one end of turn. Models that end an answer with a further token
# have it under one of these names; llama.cpp knows them the same way.
TURN_ENDS = frozenset(
    {"<turn|>", "<|tool_response>", "<end_of_turn>", "<|im_end|>", "<|end|>"}
    | {"<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"}
)
# Our own key: all the ids that end an answer, where the file's maker gave a list.
EOS_IDS_KEY = "halfbyte.eos_token_ids"
TEMPLATE_KEY = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAssets:
    """What a model knows of text. `add_bos`: a raw text is preceded by BOS."""

    vocabulary: Vocabulary
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    template: str | None
    generation: GenerationDefaults

    def token(self, token_id: int | None) -> str:
        """The string of a special id, "" for none."""
        return "" if token_id is None else self.vocabulary.tokens[token_id]


def assets_from_directory(path: Path, *, num_rows: int | None = None) -> TextAssets | None:
    """The assets of a Hugging Face directory; None without a tokenizer.json.

    `num_rows`: the rows of the embedding; by default config.json's vocab_size.
    """
    document = _json(path / "tokenizer.json")
    if not document:
        return None
    config = _json(path / "config.json")
    text_config = cast("dict[str, Any]", config.get("text_config") or {})
    rows = (
        num_rows
        or fields.number(text_config, "vocab_size", 1, MAX_TOKENS)
        or fields.number(config, "vocab_size", 1, MAX_TOKENS)
    )
    vocabulary = vocabulary_from_tokenizer_json(document, num_rows=int(rows) if rows else None)
    generation = _json(path / "generation_config.json")
    names = _json(path / "special_tokens_map.json") | _json(path / "tokenizer_config.json")
    configs = (generation, text_config, config)
    special = _SpecialIds(vocabulary, names, configs)
    eos_id = special.one("eos")
    size = len(vocabulary.tokens)
    eos_ids = [index for c in configs for index in fields.token_ids(c, "eos_token_id", size)]
    return TextAssets(
        vocabulary=vocabulary,
        bos_id=special.one("bos"),
        eos_id=eos_id,
        unk_id=_unknown(vocabulary),
        pad_id=special.one("pad"),
        add_bos=_adds_bos(vocabulary, document, names),
        template=_template(path, names),
        generation=defaults_from_config(
            generation, eos_ids=_distinct([eos_id, *eos_ids]), vocab_size=size
        ),
    )


def assets_from_metadata(metadata: Mapping[str, Any]) -> TextAssets | None:
    """The assets in a GGUF's metadata (plain Python values); None without a vocabulary."""
    vocabulary = vocabulary_from_metadata(metadata)
    if vocabulary is None:
        return None
    size = len(vocabulary.tokens)
    ids = {
        name: fields.token_id(metadata, f"{PREFIX}{name}_token_id", size)
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding")
    }
    if vocabulary.model == "llama":  # the ids of the first Llama, which old files do not state
        for name, index in (("unknown", 0), ("bos", 1), ("eos", 2)):
            ids[name] = index if ids[name] is None and index < size else ids[name]
    stated = fields.flag(metadata, PREFIX + "add_bos_token")
    return TextAssets(
        vocabulary=vocabulary,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        unk_id=ids["unknown"],
        pad_id=ids["padding"],
        add_bos=_adds_bos_by_kind(vocabulary, stated),
        template=_capped(fields.text(metadata, TEMPLATE_KEY), TEMPLATE_KEY),
        generation=defaults_from_metadata(
            metadata, eos_ids=_metadata_eos_ids(metadata, vocabulary, ids), vocab_size=size
        ),
    )


def assets_to_metadata(assets: TextAssets) -> dict[str, Any]:
    """GGUF keys and plain values (str, bool, int, float, lists); what is None is left out."""
    ends = [index for index in assets.generation.eos_ids if index != assets.eos_id]
    ids = {
        "bos": assets.bos_id,
        "eos": assets.eos_id,
        "eot": max(ends, default=None),
        "unknown": assets.unk_id,
        "padding": assets.pad_id,
    }
    values: dict[str, Any] = vocabulary_to_metadata(assets.vocabulary)
    values |= {
        f"{PREFIX}{name}_token_id": index for name, index in ids.items() if index is not None
    }
    values[PREFIX + "add_bos_token"] = assets.add_bos
    values[EOS_IDS_KEY] = list(assets.generation.eos_ids)
    if assets.template is not None:
        values[TEMPLATE_KEY] = assets.template
    return values | defaults_to_metadata(assets.generation)


@dataclass(frozen=True, slots=True)
class _SpecialIds:
    """Special ids of a directory: by the token's string first, by config.json's id otherwise."""

    vocabulary: Vocabulary
    names: Mapping[str, Any]
    configs: tuple[Mapping[str, Any], ...]

    def one(self, name: str) -> int | None:
        key = f"{name}_token"
        if key in self.names:
            return self._by_string(key)
        for config in self.configs:
            found = fields.token_ids(config, f"{key}_id", len(self.vocabulary.tokens))
            if found:
                return found[0]
        return None

    def _by_string(self, key: str) -> int | None:
        entry = self.names[key]
        token = entry.get("content") if isinstance(entry, dict) else entry
        if token is None:
            return None
        if token not in self.vocabulary.tokens:
            raise fields.wrong(key, token, "a token of the vocabulary")
        return self.vocabulary.tokens.index(token)


def _adds_bos(
    vocabulary: Vocabulary, document: Mapping[str, Any], names: Mapping[str, Any]
) -> bool:
    if document.get("post_processor") is not None and vocabulary.model != "gemma4":
        return leading_token(document) is not None
    return _adds_bos_by_kind(vocabulary, fields.flag(names, "add_bos_token"))


def _adds_bos_by_kind(vocabulary: Vocabulary, stated: bool | None) -> bool:
    """Gemma 4 needs BOS whatever its files say: without it the output is degraded."""
    if vocabulary.model == "gemma4":
        return True
    if stated is not None:
        return stated
    return vocabulary.model == "llama" or splitter_of(vocabulary.pre).adds_bos


def _metadata_eos_ids(
    metadata: Mapping[str, Any], vocabulary: Vocabulary, ids: Mapping[str, int | None]
) -> tuple[int, ...]:
    listed = fields.token_ids(metadata, EOS_IDS_KEY, len(vocabulary.tokens))
    if listed:
        return _distinct(listed)
    control = vocabulary.ids_of(TokenType.CONTROL)
    by_name = [index for index in control if vocabulary.tokens[index] in TURN_ENDS]
    return _distinct([ids["eos"], ids["eot"], ids["eom"], *by_name])


def _distinct(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(sorted({index for index in ids if index is not None}))


def _unknown(vocabulary: Vocabulary) -> int | None:
    return next(iter(vocabulary.ids_of(TokenType.UNKNOWN)), None)


def _template(path: Path, names: Mapping[str, Any]) -> str | None:
    """The chat template: its own file, else tokenizer_config's (a string, or the one "default")."""
    file = path / "chat_template.jinja"
    if file.is_file():
        return _capped(_read(file), str(file))
    found = names.get("chat_template") or _json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = {item["name"]: item["template"] for item in found if isinstance(item, dict)}
        found = named.get("default")
    return _capped(fields.text({"chat_template": found}, "chat_template"), "chat_template")


def _capped(template: str | None, where: str) -> str | None:
    if template is not None and len(template) > MAX_TEMPLATE_CHARACTERS:
        raise IntegrityError(
            f"the chat template has {len(template)} characters; "
            f"at most {MAX_TEMPLATE_CHARACTERS} are read",
            where=where,
        )
    return template


def _json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty when the file is absent."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"not valid JSON ({error})", where=path) from error
    if not isinstance(value, dict):
        raise IntegrityError("not a JSON object", where=path)
    return cast("dict[str, Any]", value)


def _read(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise IntegrityError(f"{size} bytes; at most {MAX_JSON_BYTES} are read", where=path)
    return path.read_text(encoding="utf-8")
