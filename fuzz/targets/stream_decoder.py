"""Token ids, two bytes each: decoded one by one they give what they give at once."""

from __future__ import annotations

import struct
from functools import cache

from halfbyte.text.assets import assets_from_metadata
from halfbyte.text.stream import StreamDecoder
from halfbyte.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["<s>", "</s>", "\u2581", "a", "\u2581a", "\u2581\u2581", "\u00e9", "\U0001f600", "<|x|>"]
STAND_INS = [chr(code) for code in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x144))]


@cache
def _tokenizer(model: str) -> Tokenizer:
    tokens = WORDS + BYTES if model == "llama" else [*STAND_INS, "<|x|>", "\u0120\u00c3"]
    assets = assets_from_metadata(
        {
            "tokenizer.ggml.model": model,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [
                3 if token[0] == "<" < token[1:] else 1 for token in tokens
            ],
            "tokenizer.ggml.merges": [],
        }
    )
    assert assets is not None
    return Tokenizer(assets)


def one_input(data: bytes) -> None:
    for model in ("llama", "gpt2"):
        tokenizer = _tokenizer(model)
        pairs = struct.iter_unpack("<H", data[: len(data) // 2 * 2])
        ids = [value % tokenizer.vocab_size for (value,) in pairs]
        for skip in (True, False):
            stream = StreamDecoder(tokenizer, skip_special=skip)
            text = "".join([*map(stream.push, ids), stream.finish()])
            assert text == tokenizer.decode(ids, skip_special=skip)
            assert tokenizer.decode(tokenizer.encode(text, special=True)) is not None
