"""The ledger: what every component of a model takes when it runs in a certain way. It sums.

Weights are counted as they are stored, byte for byte, and what an op set's own layout adds is a row
of its own. A cache is counted by kind of layer, its slack apart. Pure arithmetic over a spec.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from halfbyte.formats.checkpoint import Pieces
from halfbyte.kernels.contract import KVLayout
from halfbyte.models.cache import shape_for
from halfbyte.models.load import TOKENS
from halfbyte.planner.calibration import DEFAULT, Calibration
from halfbyte.planner.runtimes import Companion, Runtime
from halfbyte.specs import LayerSpec, ModelSpec, Row, Scheme, Setup

PARTS = {
    "embed.": "embedding",
    "head.": "head",
    "per_layer.": "per_layer",
    ".attn.": "attention",
    ".mlp.": "mlp",
    ".experts.": "experts",
    ".per_layer.": "per_layer",
}


def ledger(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    setup: Setup,
    runtime: Runtime,
    *,
    pieces: Pieces | None = None,
    drafter: Companion | None = None,
    calibration: Calibration = DEFAULT,
) -> tuple[Row, ...]:
    """Every row of a model's plan: weights, cache, activations, and what runs them.

    Adapters are those of the setup, which the runtime was made with; `pieces` are the tokenizer's.
    """
    return (
        *weights(spec, schemes, runtime),
        *adapters(setup, runtime),
        *(() if drafter is None else drafting(drafter, setup, runtime)),
        *cache(spec, setup, runtime),
        *activations(setup, runtime),
        *text(pieces, calibration),
        *runtime.overhead(calibration),
    )


def divided(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    setup: Setup,
    front: Runtime,
    back: Runtime,
    *,
    pieces: Pieces | None = None,
    drafter: Companion | None = None,
    calibration: Calibration = DEFAULT,
) -> tuple[Row, ...]:
    """The ledger of a model whose first layers lie on the host of the card that has the others.

    Text is the host's, whose `calibration` this is; a drafter is the card's.
    """
    host = ledger(spec, schemes, setup, front, pieces=pieces, calibration=calibration)
    card = ledger(spec, schemes, setup, back, drafter=drafter)
    return (*card, *(replace(row, place="host") for row in host))


def text(pieces: Pieces | None, calibration: Calibration) -> Iterator[Row]:
    """What a tokenizer takes."""
    if pieces is not None:
        size, source = calibration.text(pieces)
        note = f"a tokenizer of {pieces.tokens} tokens{source}"
        yield Row(component="runtime.text", bytes=size, basis="calibrated", note=note)


def weights(spec: ModelSpec, schemes: Mapping[str, Scheme], runtime: Runtime) -> Iterator[Row]:
    """What is stored, by part and scheme, and what the op set's layout adds to it."""
    sizes: Counter[str] = Counter()
    for tensor in spec.held(runtime.part):
        scheme = schemes[tensor.name]
        sizes[f"weights.{part_of(tensor.name, tensor.shape)}.{scheme.name}"] += scheme.bytes(
            tensor.shape
        )
    for component, size in sizes.items():
        yield Row(component=component, bytes=size)
    added = runtime.packed_bytes - sum(sizes.values())
    yield Row(
        component="weights.layout", bytes=added, note=f"as the {runtime.name} op set keeps it"
    )


def adapters(setup: Setup, runtime: Runtime) -> Iterator[Row]:
    """What each adapter adds to the weights; what it computes is among the activations."""
    for name, size in zip(setup.adapters, runtime.adapter_bytes, strict=True):
        yield Row(component=f"adapters.{Path(name).name}", bytes=size, note="beside the weights")


def drafting(drafter: Companion, setup: Setup, runtime: Runtime) -> Iterator[Row]:
    """A drafter's weights as they are stored, what its layout adds, and a step of it.

    It has no cache and no table of embeddings: both are the target's.
    """
    sizes: Counter[str] = Counter()
    for tensor in drafter.spec.tensors():
        if not tensor.name.endswith(TOKENS):
            scheme = drafter.schemes[tensor.name]
            sizes[scheme.name] += scheme.bytes(tensor.shape)
    for name, size in sizes.items():
        yield Row(component=f"drafter.weights.{name}", bytes=size)
    packed, step = runtime.drafter_bytes(drafter, setup)
    yield Row(
        component="drafter.layout",
        bytes=packed - sum(sizes.values()),
        note=f"as the {runtime.name} op set keeps it",
    )
    yield Row(
        component="drafter.step",
        bytes=step,
        basis=runtime.basis,
        note=f"{setup.sequences} rows at once, and the tokens of its head",
    )


def part_of(name: str, shape: tuple[int, ...]) -> str:
    """The part of a model that a tensor belongs to; vectors are norms, whatever they do."""
    if len(shape) == 1 or name.endswith("router.weight"):
        return "norms"
    return next((part for mark, part in PARTS.items() if mark in name), "other")


def cache(spec: ModelSpec, setup: Setup, runtime: Runtime) -> Iterator[Row]:
    """Keys and values by kind of layer; what is kept beyond the positions of a window or context
    (room for a step's rows, whole pages and tiles) is slack."""
    rows = min(setup.prefill_chunk, setup.context)
    shape = shape_for(
        context=setup.context,
        sequences=setup.sequences,
        rows=rows,
        kind=setup.kv,
        spare=setup.spare,
    )
    needed: Counter[str] = Counter()
    slack = 0
    for layer in (spec.layers[index] for index in runtime.part.layers):
        if layer.kv_source is not None:
            continue
        layout = shape.layout(layer)
        exact = runtime.kv_bytes(_exact(layout, layer, setup))
        needed["kv.sliding" if layout.sliding else "kv.full"] += exact
        slack += runtime.kv_bytes(layout) - exact
    for component, size in needed.items():
        yield Row(component=component, bytes=size, note=f"{setup.kv}, {_positions(setup)}")
    spare = ", spare rings" if setup.spare else ""
    yield Row(component="kv.slack", bytes=slack, note=f"room for a step's rows, whole pages{spare}")


def _exact(layout: KVLayout, layer: LayerSpec, setup: Setup) -> KVLayout:
    """The layout without slack: the positions of a window, or of the context."""
    window = layer.attention.window
    positions = setup.context if window is None else min(window, setup.context)
    return replace(layout, num_cells=positions * setup.sequences, stride=positions)


def _positions(setup: Setup) -> str:
    several = f"{setup.sequences} x " if setup.sequences > 1 else ""
    return f"{several}{setup.context} positions"


def activations(setup: Setup, runtime: Runtime) -> Iterator[Row]:
    """What a full step computes at once, and the logits of the rows that want them."""
    wanted = setup.sequences * (setup.draft + 1)
    rows = min(setup.prefill_chunk, setup.context) + wanted
    total = runtime.scratch_bytes(rows, wanted, setup)
    few, many = (runtime.scratch_bytes(rows, count, setup) for count in (1024, 2048))
    per_row = (many - few) // 1024
    for name, size, count in (
        ("step", total - wanted * per_row, rows),
        ("logits", wanted * per_row, wanted),
    ):
        note = f"{count} rows at once"
        yield Row(component=f"activations.{name}", bytes=size, basis=runtime.basis, note=note)


def bytes_per_token(spec: ModelSpec, runtime: Runtime, setup: Setup, depth: int) -> int:
    """What one decoded token reads: the weights it goes through, and the cache behind it.

    Rows of tables that are only looked up are not read; of experts, those that are used.
    """
    total, part = runtime.packed_bytes, runtime.part
    multiplied = part.ends and spec.tied_head
    tensors = [*spec.held(part)]
    stored = sum(tensor.count for tensor in tensors)
    idle = sum(
        tensor.count
        for tensor in tensors
        if tensor.name == "per_layer.embed.weight"
        or (tensor.name == "embed.weight" and not multiplied)
    )
    idle += sum(
        (layer.experts.count - layer.experts.used) * 3 * layer.experts.width * spec.hidden
        for layer in (spec.layers[index] for index in part.layers)
        if layer.experts is not None
    )
    seen = replace(setup, context=max(depth, 1), sequences=1, spare=0)
    cached = sum(row.bytes for row in cache(spec, seen, runtime) if row.component != "kv.slack")
    return total * (stored - idle) // stored + (cached if depth else 0)
