"""The prompts of text completions: one or several, text or ids, with or without an end."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from halfbyte.errors import HalfbyteError
from halfbyte.serve.failure import failure_of, refused
from halfbyte.serve.settings import MAX_PROMPTS
from halfbyte.text.tokenizer import Tokenizer

Prompt = str | list[int]

# Marks of the vocabularies that were trained to fill in the middle.
MIDDLES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
)


def prompts_of(given: str | list[int] | list[str] | list[list[int]]) -> list[Prompt]:
    """One prompt or several, each text or ids. Raises `Failure`."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise refused("the prompt is empty", "prompt")
    if isinstance(given[0], int):
        return [cast("list[int]", given)]
    if len(given) > MAX_PROMPTS:
        raise refused(f"{len(given)} prompts; at most {MAX_PROMPTS} at once", "prompt")
    return cast("list[Prompt]", given)


def ids_of(words: Tokenizer, prompt: Prompt, suffix: str | None) -> list[int]:
    """The ids of a prompt; with a `suffix`, of one that asks for what stands before that.

    Raises `Failure`.
    """
    if isinstance(prompt, list):
        if suffix:
            raise refused("suffix needs a prompt of text", "suffix")
        if not prompt:
            raise refused("the prompt is empty", "prompt")
        return prompt
    try:
        ids = _around(words, prompt, suffix) if suffix else words.encode_raw(prompt)
    except HalfbyteError as error:
        raise replace(failure_of(error), param="prompt") from error
    if not ids:
        raise refused("the prompt is empty, and this model's texts begin with no token", "prompt")
    return ids


def _around(words: Tokenizer, before: str, after: str) -> list[int]:
    """The prompt that asks for what stands between two texts."""
    for marks in MIDDLES:
        found = [words.token_id(mark) for mark in marks]
        if None not in found:
            first, second, third = (cast(int, it) for it in found)
            head, tail = (words.encode(text, special=False) for text in (before, after))
            return words.with_bos([first, *head, second, *tail, third])
    raise refused("this model was not made to fill in the middle: it cannot use suffix", "suffix")
