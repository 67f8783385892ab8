"""How routed products are recorded: rows through experts, or through clusters of a head (`routing`
has the kernels, `products` the products).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.kernels.contract import Experts
from halfbyte.kernels.triton.layout import Packed
from halfbyte.kernels.triton.linears import inputs_of
from halfbyte.kernels.triton.program import Axis, Buffer, Grid, Shape, power
from halfbyte.kernels.triton.recording import BLOCK, Recording, by_block, by_row
from halfbyte.specs import Activation, ExpertSpec

# Rows of a routed tile.
ROUTED_FEW, ROUTED_MANY = 16, 64


@dataclass(frozen=True, slots=True)
class _Routing:
    """Where rows go: to `used` of so many groups; the entries of a group and their count."""

    axis: Axis
    groups: int
    used: int
    members: Buffer
    counts: Buffer


def routed(
    recording: Recording,
    x: Buffer,
    scores: Buffer,
    experts: Experts,
    spec: ExpertSpec,
    activation: Activation,
) -> Buffer:
    """The weighted sum of the experts that each row goes through."""
    axis, used = x.axis, spec.used
    weights = Buffer(axis, used)
    entries = _chosen(recording, scores, used, spec.score_scale, (experts.scale, weights))
    routing = _listed(recording, entries, spec.count)
    inner = Buffer(axis, used * spec.width)
    _products(recording, x, experts.gate_up, inner, routing, spec.width, activation=activation)
    outer = Buffer(axis, used * x.width)
    _products(recording, inner, experts.down, outer, routing, x.width, x_per_row=1)
    out = Buffer(axis, x.width)
    recording.launch(
        "mixed_entries",
        axis,
        by_block(axis, x.width),
        x=outer,
        weights=weights,
        out=out,
        other=None,
        width=x.width,
        USED=used,
        BLOCK=BLOCK,
        OPERAND=recording.operand,
    )
    return out


def clustered(recording: Recording, x: Buffer, scores: Buffer, head: Packed, used: int) -> Buffer:
    """Logits in the clusters of the best scores, -inf elsewhere."""
    axis, clusters, vocab = x.axis, scores.width, head.shape[0]
    routing = _listed(recording, _chosen(recording, scores, used, 1.0, None), clusters)
    out = Buffer(axis, vocab)
    recording.launch(
        "filled",
        axis,
        by_block(axis, vocab),
        out=out,
        width=vocab,
        value=float("-inf"),
        BLOCK=BLOCK,
        writes=("out",),
    )
    _products(recording, x, head, out, routing, vocab // clusters, clusters=True)
    return out


def _chosen(
    recording: Recording,
    scores: Buffer,
    used: int,
    score_scale: float,
    weighted: tuple[Packed, Buffer] | None,
) -> Buffer:
    """The groups [R, used] of every row, and where asked for their weights."""
    entries = Buffer(scores.axis, used, "i32")
    scale, weights = weighted or (None, None)
    recording.launch(
        "chosen",
        scores.axis,
        by_row(scores.axis),
        scores=scores,
        scale=scale,
        entries=entries,
        weights=weights,
        groups=scores.width,
        score_scale=score_scale,
        USED=used,
        WEIGHTED=weighted is not None,
        BLOCK=power(scores.width),
        writes=("entries", "weights"),
    )
    return entries


def _listed(recording: Recording, entries: Buffer, groups: int) -> _Routing:
    axis = entries.axis
    members = Buffer("fixed", 1, "i32", lambda shape: groups * max(shape.of(axis), 1))
    counts = Buffer("fixed", groups, "i32")
    recording.launch(
        "listed",
        axis,
        lambda shape: (groups,),
        settings=lambda shape: {"capacity": max(shape.of(axis), 1)},
        entries=entries,
        members=members,
        counts=counts,
        USED=entries.width,
        WIDE=power(entries.width),
        BLOCK=64,
        writes=("members", "counts"),
    )
    return _Routing(axis, groups, entries.width, members, counts)


def _products(
    recording: Recording,
    x: Buffer,
    weight: Packed,
    out: Buffer,
    routing: _Routing,
    height: int,
    *,
    x_per_row: int | None = None,
    activation: Activation | None = None,
    clusters: bool = False,
) -> None:
    """Products of entries with their group's rows, `height` outputs for each; of x every
    `x_per_row` entries share a row, by default all of a row."""
    axis, tiling = routing.axis, recording.tiling

    def rows(shape: Shape) -> int:
        return ROUTED_FEW if shape.of(axis) <= ROUTED_FEW else ROUTED_MANY

    def grid(shape: Shape) -> Grid:
        return routing.groups, -(-shape.of(axis) // rows(shape)), -(-height // tiling.few)

    def settings(shape: Shape) -> dict[str, Any]:
        tile = {"BN": tiling.few, "BM": rows(shape), "capacity": max(shape.of(axis), 1)}
        return tile | tiling.warps(ROUTED_FEW)

    recording.launch(
        "routed",
        axis,
        grid,
        settings=settings,
        counted=False,
        x=recording.as_operand(x),
        weight=weight,
        out=out,
        other=None,
        members=routing.members,
        counts=routing.counts,
        N=height,
        tiles=weight.layout.tiles,
        per_row=routing.used,
        x_per_row=x_per_row or routing.used,
        out_width=out.width if clusters else height,
        GATED=activation is not None,
        CLUSTERS=clusters,
        ACTIVATION=activation,
        **inputs_of(weight),
        OPERAND=recording.operand,
    )
