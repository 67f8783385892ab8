"""Tokenizer metadata as a GGUF may hold it, here as JSON: vocabulary, tokenizer, and a text."""

from __future__ import annotations

import json

from halfbyte.text.assets import assets_from_metadata, assets_to_metadata
from halfbyte.text.stream import StreamDecoder
from halfbyte.text.tokenizer import Tokenizer

TEXT = "Hello  wor\u00e9ld <s></s> 12345\n\n\U0001f600"


def one_input(data: bytes) -> None:
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return
    assets = assets_from_metadata(metadata) if isinstance(metadata, dict) else None
    if assets is None:
        return
    assert assets_from_metadata(assets_to_metadata(assets)) == assets
    tokenizer = Tokenizer(assets)
    for special in (True, False):
        ids = tokenizer.encode_raw(TEXT, special=special)
        stream = StreamDecoder(tokenizer)
        assert tokenizer.decode(ids) == "".join([*map(stream.push, ids), stream.finish()])
