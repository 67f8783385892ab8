"""What two specs say of a model, side by side: sentences for people, the model's first.

What the file kinds write apart (names, the context, whether the head is stored twice) is no
difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import isclose
from typing import Any

from halfbyte.specs.model import LayerSpec, ModelSpec, RopeSpec

IGNORED = frozenset({"family", "architecture", "context", "tied_head", "layers"})
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


def spec_differences(
    model: ModelSpec, reference: ModelSpec, has: str = "the reference has"
) -> list[str]:
    """Where the computation of one is not the other's; `has` begins what the reference has."""
    found = [_sentence(*it, has=has) for it in _differences(model, reference, "")]
    if len(model.layers) != len(reference.layers):
        return [
            *found,
            f"has {len(model.layers)} layers; {has} {len(reference.layers)}",
        ]
    where: dict[str, list[int]] = {}
    for index, (layer, other) in enumerate(zip(model.layers, reference.layers, strict=True)):
        for difference in _differences(layer, other, ""):
            where.setdefault(_sentence(*difference, has=has), []).append(index)
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


def _sentence(name: str, ours: Any, theirs: Any, *, has: str) -> str:
    return f"{WORDS.get(name, name)} is {_shown(ours)}; {has} {_shown(theirs)}"


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
