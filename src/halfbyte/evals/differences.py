"""What two models say of themselves, side by side: their descriptions and their text assets.

A quantized model computes what its reference computes, so every difference here is a fault, or the
wrong reference. Differences are sentences for people, the model first. What the file kinds write
apart (names, the context, whether the head is stored twice) is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from math import isclose
from typing import Any

from halfbyte.specs import LayerSpec, ModelSpec, RopeSpec
from halfbyte.text.assets import TextAssets
from halfbyte.text.chat import Chat
from halfbyte.text.tokenizer import Tokenizer

IGNORED = frozenset({"family", "architecture", "context", "tied_head", "layers"})
# Texts that tokenizers cut differently when their splitters, spaces, digits or bytes differ.
PROBE = "Hello, world!  It's 12345.\n\tdef f(x): return x\u00e9 \u6771\u4eac \U0001f600"
WORDS = {
    "embed_scale": "embedding multiplier",
    "logit_softcap": "logit soft-cap",
    "attention.rope.theta": "rope base",
    "attention.rope.divisors": "rope scaling",
    "attention.window": "sliding window",
    "attention.scale": "attention scale",
    "attention.shares_kv": "K = V",
    "attention.value_norm": "norm of values",
    "attention.qk_norm": "q/k norms",
    "scalar": "layer scalar",
    "mlp.activation": "activation",
}


def spec_differences(model: ModelSpec, reference: ModelSpec) -> list[str]:
    """Where the computation of one is not the other's."""
    found = [_sentence(*difference) for difference in _differences(model, reference, "")]
    if len(model.layers) != len(reference.layers):
        return [
            *found,
            f"has {len(model.layers)} layers; the reference has {len(reference.layers)}",
        ]
    where: dict[str, list[int]] = {}
    for index, (layer, other) in enumerate(zip(model.layers, reference.layers, strict=True)):
        for difference in _differences(layer, other, ""):
            where.setdefault(_sentence(*difference), []).append(index)
    return [*found, *(f"{_layers(at, reference)}: {text}" for text, at in where.items())]


def _differences(model: Any, reference: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(field, ours, theirs) of two spec objects of one class, nested ones by dotted names."""
    for field in fields(model):
        name = f"{path}{field.name}"
        ours, theirs = getattr(model, field.name), getattr(reference, field.name)
        if field.name in IGNORED or not field.compare:
            continue
        if is_dataclass(ours) and type(ours) is type(theirs):
            yield from _differences(ours, theirs, f"{name}.")
        elif field.name == "divisors" and not _same(ours, theirs):
            yield name, _scaling(model), _scaling(reference)
        elif not _same(ours, theirs):
            yield name, ours, theirs


def _same(ours: Any, theirs: Any) -> bool:
    """Equal, numbers to the precision of an f32: metadata may hold no more."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        return isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs


def _scaling(rope: RopeSpec) -> str:
    return "none" if rope.divisors is None else rope.scaling


def _sentence(name: str, ours: Any, theirs: Any) -> str:
    return f"{WORDS.get(name, name)} is {_shown(ours)}; the reference has {_shown(theirs)}"


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _layers(index: list[int], spec: ModelSpec) -> str:
    kinds = {_kind(spec.layers[i]) for i in index}
    kind = kinds.pop() + " " if len(kinds) == 1 else ""
    every = len(index) == sum(not kind or _kind(layer) in kind for layer in spec.layers)
    which = "all" if every else ", ".join(map(str, index))
    return f"{which} {kind}layers" if every else f"{kind}layers {which}"


def _kind(layer: LayerSpec) -> str:
    return "full" if layer.attention.window is None else "sliding"


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
    ours, theirs = (_Side(assets, Tokenizer(assets)) for assets in (model, reference))
    return [*_vocabulary(ours, theirs), *_beginning(ours, theirs), *_ending(ours, theirs)]


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
