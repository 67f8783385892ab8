"""Whether a drafter belongs to a target, and which of the target's layers it reads."""

from __future__ import annotations

from halfbyte.errors import InvalidInputError
from halfbyte.specs.model import LayerSpec, ModelSpec


def paired_layers(drafter: ModelSpec, target: ModelSpec) -> tuple[int, ...]:
    """For every layer of a drafter, the layer of the target whose keys and values it reads.

    Raises `InvalidInputError`, with what differs, for a drafter of another target.
    """
    if drafter.drafter is None or target.drafter is not None:
        which = "the model is no drafter" if drafter.drafter is None else "the target is a drafter"
        raise InvalidInputError(which, hint="--drafter takes a drafter, MODEL the model itself")
    for what, its, the_targets in (
        ("width", drafter.drafter.target_hidden, target.hidden),
        ("vocabulary", drafter.vocab, target.vocab),
    ):
        if its != the_targets:
            raise _of_another(f"it is for a target of {what} {its}, not {the_targets}")
    return tuple(_source(layer, target) for layer in drafter.layers)


def _source(layer: LayerSpec, target: ModelSpec) -> int:
    """`kv_source` counts from the end of the target's layers of the kind that keep keys."""
    kind = "full" if layer.attention.window is None else "sliding"
    own = [
        index
        for index, other in enumerate(target.layers)
        if other.kv_source is None
        and (other.attention.window is None) == (layer.attention.window is None)
    ]
    if layer.kv_source is None or not 0 < -layer.kv_source <= len(own):
        raise _of_another(f"it reads a {kind} layer that the target does not have")
    found = own[layer.kv_source]
    its, the_targets = (
        (it.kv_heads, it.head_dim, it.window, it.rope)
        for it in (layer.attention, target.layers[found].attention)
    )
    if its != the_targets:
        raise _of_another(
            f"it reads {its[0]} key/value heads of {its[1]} in a {kind} layer of window {its[2]}; "
            f"the target has {the_targets[0]} of {the_targets[1]}, window {the_targets[2]}"
            + ("" if its[:3] != the_targets[:3] else ", rotated otherwise")
        )
    return found


def _of_another(what: str) -> InvalidInputError:
    return InvalidInputError(
        f"this is the drafter of another target: {what}",
        hint="take the drafter that was made for this model, or --draft off",
    )
