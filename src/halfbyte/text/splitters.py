"""How byte-level vocabularies cut a text into words before they merge: one row per `pre` name.

The names are GGUF's tokenizer.ggml.pre; the expressions are the ones of the models' own
tokenizer.json files. "default" is what llama.cpp runs for files that name no splitter: four
expressions, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splitter:
    """`patterns` cut in turn. `compose`: the text is first brought to Unicode's NFC.

    `whole_words`: a word that is a token stays whole, whatever the merges say.
    `adds_bos`: a text begins with BOS unless the file says otherwise.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    adds_bos: bool = False


SPLITTERS = {
    "default": Splitter(
        patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
    "gpt-2": Splitter(patterns=(_GPT2,)),
    "llama-bpe": Splitter(patterns=(_WORDS % "{1,3}",), whole_words=True, adds_bos=True),
    "qwen2": Splitter(patterns=(_WORDS % "",), compose=True),
}


def splitter_of(pre: str) -> Splitter:
    """The row of this name; an UnsupportedError lists the names there are."""
    if pre not in SPLITTERS:
        raise UnsupportedError(
            f"no word splitter named {pre[:60]!r}",
            where="tokenizer.ggml.pre",
            hint=f"known: {', '.join(sorted(SPLITTERS))}",
        )
    return SPLITTERS[pre]


def pre_of_pattern(pattern: str) -> str | None:
    """The name of the splitter with exactly this one expression."""
    for name, splitter in SPLITTERS.items():
        if splitter.patterns == (pattern,):
            return name
    return None
