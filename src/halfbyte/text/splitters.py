"""How byte-level vocabularies cut a text into words before they merge: one row per `pre` name.

The names are GGUF's tokenizer.ggml.pre; the expressions are the ones of the models' own
tokenizer.json files. llama.cpp makes the same cuts, but for marks in "tekken" and "gpt-4o", and it
never composes characters as Qwen's makers do. "default" is what it runs for files that name no
splitter: four expressions, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.errors import UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_MARKED = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
# Words end where an upper case letter follows a lower case one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
    rf"|\p{{N}}%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
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
    "smollm": Splitter(patterns=(r"\p{N}", _GPT2)),
    "llama-bpe": Splitter(patterns=(_WORDS % "{1,3}",), whole_words=True, adds_bos=True),
    "qwen2": Splitter(patterns=(_WORDS % "",), compose=True),
    "qwen35": Splitter(patterns=(_MARKED,), compose=True),
    "stablelm2": Splitter(patterns=(_WORDS % "",)),
    "tekken": Splitter(patterns=(_CASED % ("", "", ""),), whole_words=True, adds_bos=True),
    "gpt-4o": Splitter(patterns=(_CASED % (f"{_SUFFIX}?", f"{_SUFFIX}?", "{1,3}"),)),
}
# Other names for the same, as converters write them.
ALIASES = {
    "phi-2": "gpt-2",
    **dict.fromkeys(("refact", "starcoder"), "smollm"),
    **dict.fromkeys(("falcon3", "lfm2", "llama-v3", "llama3"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "megrez"), "qwen2"),
    "llama4": "gpt-4o",
}


def splitter_of(pre: str) -> Splitter:
    """The row of this name or alias; an UnsupportedError lists the names there are."""
    name = ALIASES.get(pre, pre)
    if name not in SPLITTERS:
        raise UnsupportedError(
            f"no word splitter named {pre[:60]!r}",
            where="tokenizer.ggml.pre",
            hint=f"known: {', '.join(sorted((*SPLITTERS, *ALIASES)))}",
        )
    return SPLITTERS[name]


def pre_of_pattern(pattern: str) -> str | None:
    """The name of the splitter with exactly this one expression."""
    for name, splitter in SPLITTERS.items():
        if splitter.patterns == (pattern,):
            return name
    return None
