"""The cache of keys and values, and a sequence's share of it: its `Slot`, which can roll back.

Layers that see everything are paged: a sequence owns a list of pages, the same in each such layer.
Sliding layers are rings of `window + slack` cells: a forward of up to `slack` rows never overwrites
a key that one of its rows still sees, and up to `slack` positions can be taken back. Which pages
and which ring a sequence gets is decided upstairs (integers); this file owns the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from halfbyte.errors import InvalidInputError
from halfbyte.kernels.contract import (
    Array,
    Choosing,
    KVLayout,
    Preparing,
    Span,
    Step,
)
from halfbyte.specs import AttentionSpec, KVType, LayerSpec, ModelSpec

# Rings are whole tiles of positions, so that a tile never wraps.
RING_STEP = 64
PAGE_LEN = 64
# A draft of seven and the target's own token: rows that one pass over the weights serves at once.
DRAFT_ROWS = 8
# Keys are made of values in whole vectors of both halves of a head.
HEAD_STEP = 32


@dataclass(slots=True, kw_only=True)
class Slot:
    """One sequence's share of the cache: positions `[0, length)` are committed.

    Invariant: the cells of `[max(0, written - ring_len), written)` hold keys of this sequence,
    where `written >= length` is the furthest position ever written.
    """

    pages: list[int] = field(default_factory=list[int])
    ring: int = 0
    length: int = 0
    written: int = 0

    def advance(self, count: int, adapter: int | None = None) -> Span:
        """Takes the next `count` positions; returns them as a span."""
        span = Span(
            start=self.length, count=count, pages=self.pages, ring=self.ring, adapter=adapter
        )
        self.length += count
        self.written = max(self.written, self.length)
        return span

    def rollback(self, count: int) -> None:
        """Takes back the last `count` positions (a rejected draft, an abandoned chunk)."""
        if not 0 <= count <= self.length:
            raise InvalidInputError(f"cannot roll back {count} of {self.length} positions")
        self.length -= count


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """How much cache: pages of `page_len` positions, one ring per sequence, spare ring cells."""

    pages: int
    page_len: int = 64
    rings: int = 1
    ring_slack: int = 512
    kind: KVType = "bf16"

    def layout(self, layer: LayerSpec) -> KVLayout:
        """The cells of one layer."""
        attention = layer.attention
        sliding = attention.window is not None
        stride = self.page_len
        if attention.window is not None:
            stride = -(-(attention.window + self.ring_slack) // RING_STEP) * RING_STEP
        makes_keys = _makes_keys(attention)
        return KVLayout(
            num_cells=stride * (self.rings if sliding else self.pages),
            stride=stride,
            sliding=sliding,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            # Values alone in bf16 are fewer bytes than keys and values in q8_0.
            kind="bf16" if makes_keys and self.kind == "q8_0" else self.kind,
            key_rope=attention.rope if makes_keys else None,
        )


def _makes_keys(attention: AttentionSpec) -> bool:
    """Whether a key is its value times a weight, rotated, so that values are all that is kept.

    A ring is small, and keeps both.
    """
    same = attention.shares_kv and attention.value_norm and attention.qk_norm
    return same and attention.window is None and attention.head_dim % HEAD_STEP == 0


def shape_for(
    *,
    context: int,
    sequences: int,
    rows: int,
    kind: KVType,
    pages: int | None = None,
    spare: int = 0,
) -> CacheShape:
    """The cache of an engine: `sequences` of up to `context` positions, `rows` of a prompt in a
    step. `pages` are those that suffice for all at once, unless given; `spare` rings are for what
    is kept of sequences that have ended."""
    return CacheShape(
        pages=sequences * -(-context // PAGE_LEN) if pages is None else pages,
        page_len=PAGE_LEN,
        rings=sequences + spare,
        ring_slack=max(rows, DRAFT_ROWS),
        kind=kind,
    )


class Cache:
    """The cells of every layer, and the step that runs a model over them.

    Sequences enter with a `Slot`. A layer with a `kv_source` has the cells of that layer; a layer
    that is not there has None. `ring_len` is the length of the shortest ring, None where no
    layer slides.
    """

    def __init__(
        self, spec: ModelSpec, shape: CacheShape, layers: Sequence[Array | None], step: Step
    ) -> None:
        self.shape = shape
        self.layers: list[Array] = [*layers]
        self.nbytes = 0
        self._rings: list[Array] = []
        self.ring_len: int | None = None
        for layer, cells in zip(spec.layers, layers, strict=False):
            if layer.kv_source is not None or cells is None:
                continue
            layout = shape.layout(layer)
            self.nbytes += cells.nbytes
            if layout.sliding:
                self._rings.append(cells)
                self.ring_len = min(self.ring_len or layout.stride, layout.stride)
        self.step = step

    def copy_ring(self, source: int, target: int) -> None:
        """What one ring holds, into another, in every sliding layer."""
        for cells in self._rings:
            cells.copy_ring(source, target)

    @property
    def chooses(self) -> bool:
        """Whether its step can choose tokens where it computes logits."""
        return isinstance(self.step, Choosing)

    def prepare(self, rows: int, wanted: int, sequences: int) -> None:
        """Gets every step up to this size ready now, where steps take memory of their own."""
        if isinstance(self.step, Preparing):
            self.step.prepare(rows, wanted, sequences)

    def seed(self) -> None:
        """Makes every cell resident, as if it had been filled; what sequences had is gone."""
        for layer in self.layers:
            layer.seed()

    def check(self, slot: Slot, count: int) -> None:
        """That `count` more rows may enter in one forward; a failure is the caller's bug."""
        room, slack = len(slot.pages) * self.shape.page_len, self.shape.ring_slack
        taken_back = slot.written - slot.length
        assert slot.length + count <= room, f"{slot.length} + {count} positions, room for {room}"
        assert count <= slack, f"{count} rows in one forward, ring slack {slack}"
        assert taken_back <= slack, f"{taken_back} positions rolled back, ring slack {slack}"
