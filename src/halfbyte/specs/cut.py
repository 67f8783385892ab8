"""Where a model can be cut in two: its last layers for a card, those before them for the CPU.

The embeddings go with the first layers; the final norm and the head with the last ones, so that
tokens are chosen on the card. Tables that are only looked up cost a card memory and a CPU no time:
with all layers on the card they may still lie on the CPU. A layer that reads the cache of another
one stays with it, and so does a drafter, which embeds by the table of a tied head. It decides
nothing: how many layers a card has room for is the planner's to say.
"""

from __future__ import annotations

from halfbyte.errors import InvalidInputError
from halfbyte.specs.model import ModelSpec, Part
from halfbyte.specs.pairing import paired_layers


def cuts(spec: ModelSpec) -> tuple[int, ...]:
    """How many of the last layers can lie on a card, ascending.

    Of all of them the embeddings can be parted still, unless they are the head and nothing else.
    """
    count = len(spec.layers)
    only_head = spec.tied_head and spec.per_layer is None
    return tuple(
        number
        for number in range(1, count if only_head else count + 1)
        if _torn(spec, number) is None
    )


def parts_of(spec: ModelSpec, card_layers: int) -> tuple[Part, Part]:
    """What lies on the CPU, and what on the card."""
    first = len(spec.layers) - card_layers
    return Part(range(first), ends=False), Part(range(first, len(spec.layers)), begins=False)


def check_cut(spec: ModelSpec, card_layers: int) -> None:
    """`InvalidInputError` for a number of layers that the model does not have, or that would part a
    layer from the cache it reads."""
    count = len(spec.layers)
    if not 1 <= card_layers <= count:
        raise InvalidInputError(
            f"{card_layers} layers on the card; the model has {count}",
            hint=f"give --card-layers 1 to {count}, or --device cpu for none",
        )
    torn = _torn(spec, card_layers)
    if torn is not None:
        source = spec.layers[torn].kv_source
        least = next(number for number in (*cuts(spec), count) if number > card_layers)
        raise InvalidInputError(
            f"with {card_layers} layers on the card, layer {torn} would read the cache of layer "
            f"{source} from the CPU",
            hint=f"give --card-layers {least} or more",
        )


def parted(drafter: ModelSpec, target: ModelSpec, card_layers: int) -> str | None:
    """Why a drafter cannot work beside the last layers of its target; None if it can."""
    first = len(target.layers) - card_layers
    before = [layer for layer in paired_layers(drafter, target) if layer < first]
    if before:
        return f"it reads the cache of layer {before[0]}, which lies on the CPU"
    if not target.tied_head:
        return "it embeds by the target's table, which lies on the CPU"
    return None


def divided_name(back: str, front: str, layers: int) -> str:
    """The names of two op sets, the front of which has so many layers."""
    return f"{back} behind {f'{layers} layers' if layers else 'the embeddings'} of {front}"


def _torn(spec: ModelSpec, card_layers: int) -> int | None:
    """A layer on the card that reads the cache of one that is not there."""
    first = len(spec.layers) - card_layers
    return next(
        (
            index
            for index, layer in enumerate(spec.layers)
            if index >= first and layer.kv_source is not None and layer.kv_source < first
        ),
        None,
    )
