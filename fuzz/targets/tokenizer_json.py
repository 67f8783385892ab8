"""The text files of a Hugging Face directory: tokenizer.json, and what stands beside it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from halfbyte.text.assets import assets_from_directory
from halfbyte.text.tokenizer import Tokenizer
from targets.tokenizer_metadata import TEXT

NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


def one_input(data: bytes) -> None:
    """The files one after the other, with a zero byte between them."""
    with TemporaryDirectory() as folder:
        for name, content in zip(NAMES, data.split(b"\0"), strict=False):
            (Path(folder) / name).write_bytes(content)
        assets = assets_from_directory(Path(folder))
    if assets is not None:
        tokenizer = Tokenizer(assets)
        tokenizer.decode(tokenizer.encode_raw(TEXT))
