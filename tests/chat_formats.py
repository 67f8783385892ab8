"""A small vocabulary for each chat format, of bytes and the format's marks, and its template."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.generation import GenerationDefaults
from halfbyte.text.tokenizer import Tokenizer
from halfbyte.text.vocabulary import TokenType, Vocabulary

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = ("chatml", "gemma3", "gemma4", "llama3", "mistral", "qwen2", "qwen3")
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# bos, eos, then the rest; "~" marks a token that is no control token, as Qwen has them
_TOKENS = {
    "chatml": ("", *_IM[2:], *_IM[:2]),
    "gemma3": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "gemma4": (
        "<bos>", "<eos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>",
        "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
        "<tool_response|>", '<|"|>',
    ),
    "llama3": (
        "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|python_tag|>", "<|eom_id|>",
    ),
    "mistral": (
        "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    ),
    "qwen2": ("", *_IM[2:], *_IM[:2], "~<tool_call>", "~</tool_call>"),
    "qwen3": (
        "", *_IM[2:], *_IM[:2], "~<tool_call>", "~</tool_call>", "~<think>", "~</think>",
        "~<tool_response>", "~</tool_response>",
    ),
}  # fmt: skip


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def ends(name: str) -> tuple[str, str]:
    """The strings of BOS and EOS."""
    return _TOKENS[name][0], _TOKENS[name][1]


def assets(name: str) -> TextAssets:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    marks = [mark for mark in _TOKENS[name] if mark]
    plain = [mark.startswith("~") for mark in marks]
    tokens = (*alphabet, *(mark.removeprefix("~") for mark in marks))
    kinds = [TokenType.USER_DEFINED if is_plain else TokenType.CONTROL for is_plain in plain]
    bos, eos = ends(name)
    eos_id = tokens.index(eos)
    return TextAssets(
        vocabulary=Vocabulary(
            model="gpt2", tokens=tokens, types=(*[TokenType.NORMAL] * len(alphabet), *kinds)
        ),
        bos_id=tokens.index(bos) if bos else None,
        eos_id=eos_id,
        unk_id=None,
        pad_id=None,
        add_bos=bool(bos),
        template=template(name),
        generation=GenerationDefaults(eos_ids=(eos_id,)),
    )


def tokenizer_and_chat(name: str) -> tuple[Tokenizer, Chat]:
    found = assets(name)
    tokenizer = Tokenizer(found)
    return tokenizer, Chat(tokenizer, found)
