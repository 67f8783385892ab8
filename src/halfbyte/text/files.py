"""Text assets as the files of a Hugging Face directory: the way back from `assets_from_directory`.

The tokenizer is the pipeline that encodes here, with a decoder and the token it puts first. Rows of
the embedding that have no token are left out, as the makers of such files do.
"""

from __future__ import annotations

import json
from typing import Any

from halfbyte.text.assets import TextAssets
from halfbyte.text.backend import encoders
from halfbyte.text.generation import defaults_to_config
from halfbyte.text.vocabulary import SPACE, TokenType

SPACED_DECODER = [
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}


def files_of(assets: TextAssets) -> dict[str, str]:
    """File name -> its text."""
    files = {
        "tokenizer.json": json.dumps(_tokenizer(assets), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(_names(assets), ensure_ascii=False, indent=2),
        "generation_config.json": json.dumps(_generation(assets), indent=2),
    }
    if assets.template is not None:
        files["chat_template.jinja"] = assets.template
    return files


def _tokenizer(assets: TextAssets) -> dict[str, Any]:
    vocabulary = assets.vocabulary
    document: dict[str, Any] = json.loads(encoders(vocabulary, assets.unk_id)[1].to_str())
    unused = {
        f"[PAD{index}]"
        for index in vocabulary.ids_of(TokenType.UNUSED)
        if vocabulary.tokens[index] == f"[PAD{index}]"
    }
    ids = document["model"]["vocab"]
    document["model"]["vocab"] = {token: ids[token] for token in ids if token not in unused}
    if vocabulary.model == "gpt2":
        document["decoder"] = BYTE_LEVEL
    else:
        strip = [] if vocabulary.space_prefix == "never" else [STRIP]
        document["decoder"] = {"type": "Sequence", "decoders": [*SPACED_DECODER, *strip]}
    document["post_processor"] = _post_processor(assets)
    return document


def _post_processor(assets: TextAssets) -> dict[str, Any]:
    """BOS before a text, where the model wants it."""
    first: list[dict[str, Any]] = []
    special: dict[str, Any] = {}
    if assets.add_bos and assets.bos_id is not None:
        token = assets.token(assets.bos_id)
        first = [{"SpecialToken": {"id": token, "type_id": 0}}]
        special = {token: {"id": token, "ids": [assets.bos_id], "tokens": [token]}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [*first, text],
        "pair": [*first, text, other],
        "special_tokens": special,
    }


def _names(assets: TextAssets) -> dict[str, Any]:
    ids = {"bos": assets.bos_id, "eos": assets.eos_id, "unk": assets.unk_id, "pad": assets.pad_id}
    tokens = {
        f"{name}_token": assets.token(index) for name, index in ids.items() if index is not None
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "add_bos_token": assets.add_bos,
        "clean_up_tokenization_spaces": False,
    }


def _generation(assets: TextAssets) -> dict[str, Any]:
    ids = {"bos_token_id": assets.bos_id, "pad_token_id": assets.pad_id}
    stated = {key: index for key, index in ids.items() if index is not None}
    return {**stated, **defaults_to_config(assets.generation)}
