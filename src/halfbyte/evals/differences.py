"""What the text assets of two models say, side by side (specs/differences.py has their specs).

A quantized model computes what its reference computes, so every difference here is a fault, or the
wrong reference. Differences are sentences for people, the model first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

# Texts that tokenizers cut differently when their splitters, spaces, digits or bytes differ.
PROBE = "Hello, world!  It's 12345.\n\tdef f(x): return x\u00e9 \u6771\u4eac \U0001f600"


@dataclass(frozen=True, slots=True)
class _Side:
    """The text assets of one of the two, and what is made of them once."""

    assets: TextAssets
    tokenizer: Tokenizer

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.assets.vocabulary.tokens


def text_differences(model: TextAssets, reference: TextAssets) -> list[str]:
    """Where texts become other ids, or answers end elsewhere."""
    ours, theirs = _sides(model, reference)
    return [*_vocabulary(ours, theirs), *_beginning(ours, theirs), *_ending(ours, theirs)]


def vocabulary_differences(model: TextAssets, reference: TextAssets) -> list[str]:
    """Where an id means another token, or a text becomes other tokens."""
    return [*_vocabulary(*_sides(model, reference))]


def _sides(model: TextAssets, reference: TextAssets) -> tuple[_Side, _Side]:
    return _Side(model, Tokenizer(model)), _Side(reference, Tokenizer(reference))


def _vocabulary(ours: _Side, theirs: _Side) -> Iterator[str]:
    if len(ours.tokens) != len(theirs.tokens):
        yield f"the tokenizer has {len(ours.tokens)} tokens; the reference's {len(theirs.tokens)}"
    pairs = enumerate(zip(ours.tokens, theirs.tokens, strict=False))
    first = next((index for index, (token, other) in pairs if token != other), None)
    if first is not None:
        token, other = ours.tokens[first], theirs.tokens[first]
        yield f"token {first} is {token!r}; the reference has {other!r}{_shift(ours, theirs)}"
    elif len({tuple(side.tokenizer.encode(PROBE, special=False)) for side in (ours, theirs)}) > 1:
        yield "the tokenizer cuts texts into other tokens than the reference's"


def _shift(ours: _Side, theirs: _Side) -> str:
    wanted = theirs.tokens[100:200]
    off = next((by for by in (1, -1) if ours.tokens[100 + by : 200 + by] == wanted), None)
    return "" if off is None else f" (the vocabulary is off by {off:+d})"


def _beginning(ours: _Side, theirs: _Side) -> Iterator[str]:
    begun, wanted = (side.tokenizer.with_bos([]) for side in (ours, theirs))
    if begun != wanted:
        yield f"texts begin with {_bos(begun)}; the reference's with {_bos(wanted)}"


def _bos(ids: list[int]) -> str:
    return f"BOS {ids[0]}" if ids else "no BOS"


def _ending(ours: _Side, theirs: _Side) -> Iterator[str]:
    stops, wanted = (Chat(side.tokenizer, side.assets).stop_ids for side in (ours, theirs))
    if wanted - stops:
        missing = ", ".join(f"{i} {theirs.assets.token(i)!r}" for i in sorted(wanted - stops))
        yield f"answers do not stop at {missing}, as the reference's do"
    if ours.assets.template != theirs.assets.template:
        yield "the chat template is another than the reference's"
