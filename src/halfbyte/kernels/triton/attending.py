"""How attention is recorded: rotation, cells, and tiles of queries (`heads` has the kernels).

A tile is rows of one sequence by the query heads of a key head. A few rows spread the pieces of
their sums over programs, many go through them one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfbyte.kernels.contract import KVLayout
from halfbyte.kernels.triton.cells import TILE, TritonKV
from halfbyte.kernels.triton.layout import Packed
from halfbyte.kernels.triton.program import PIECE, Buffer, Grid, Shape, Table, power, tiles_for
from halfbyte.kernels.triton.recording import Recording, by_row
from halfbyte.specs import AttentionSpec

# Positions of a tile of keys: of long heads it is shorter, to fit on a chip (`Tiling`).
KEYS, LONG_HEAD = TILE, 512
# The most columns of a tile of queries.
QUERY_COLUMNS = 64
NO_WINDOW = 1 << 30


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys and values that are to be kept, and the norm of the keys."""

    k: Buffer
    v: Buffer
    k_norm: Packed | None
    kv: TritonKV


def turned(
    recording: Recording,
    q: Buffer,
    q_norm: Packed | None,
    attention: AttentionSpec,
    eps: float,
    frequencies: Packed,
    stored: Stored | None,
) -> Buffer:
    """Rotated queries; keys and values go to their cells."""
    out, kv = Buffer(q.axis, q.width), None if stored is None else stored.kv
    kv_heads = 0 if kv is None else attention.kv_heads
    if kv is not None:
        recording.seen(kv)
    recording.launch(
        "turned",
        q.axis,
        by_row(q.axis, attention.heads + 2 * kv_heads),
        q=q,
        k=None if stored is None else stored.k,
        v=None if stored is None else stored.v,
        q_norm=q_norm,
        k_norm=None if stored is None else stored.k_norm,
        frequencies=frequencies,
        out=out,
        other=None,
        cells=kv,
        positions=Table("positions"),
        sequences=Table("sequences"),
        pages=Table("pages"),
        rings=Table("rings"),
        ahead=attention.ahead,
        eps=eps,
        num_cells=0 if kv is None else kv.layout.num_cells,
        stride=1 if kv is None else kv.layout.stride,
        most_pages=Table("most_pages"),
        Q_NORMED=q_norm is not None,
        K_NORMED=stored is not None and stored.k_norm is not None,
        VALUE_NORM=attention.value_norm,
        HEADS=attention.heads,
        KV_HEADS=kv_heads,
        KINDS=2 if kv is None else kv.kinds,
        SLIDING=kv is not None and kv.layout.sliding,
        CELL="f32" if kv is None else kv.layout.kind,
        D=attention.head_dim,
        HALF=_half(attention.head_dim),
        STAGES=_stages(attention.head_dim),
        OPERAND=recording.operand,
    )
    return out


def attended(
    recording: Recording, q: Buffer, attention: AttentionSpec, kv: TritonKV, frequencies: Packed
) -> Buffer:
    """Softmax attention over the cells; those of q8_0 are rotated, so queries and outputs are."""
    recording.seen(kv)
    if kv.layout.kind != "q8_0":
        return _summed(recording, q, attention, kv, frequencies)
    mixed = _mixed_heads(recording, q, attention)
    return _mixed_heads(recording, _summed(recording, mixed, attention, kv, frequencies), attention)


def _mixed_heads(recording: Recording, x: Buffer, attention: AttentionSpec) -> Buffer:
    """Every head times the Hadamard matrix."""
    out, dim = Buffer(x.axis, x.width), attention.head_dim
    recording.launch(
        "mixed_heads",
        x.axis,
        by_row(x.axis, attention.heads),
        x=x,
        out=out,
        other=None,
        HEADS=attention.heads,
        HALF=dim // 2,
        STAGES=_stages(dim),
        OPERAND=recording.operand,
    )
    return out


def _summed(
    recording: Recording, q: Buffer, attention: AttentionSpec, kv: TritonKV, frequencies: Packed
) -> Buffer:
    out, layout, dim = Buffer(q.axis, q.width), kv.layout, attention.head_dim
    cut = _Cut(attention, layout, recording.tiling.queries)
    recording.launch(
        "attended",
        q.axis,
        cut.grid,
        settings=cut.settings,
        counted=False,
        q=recording.as_operand(q),
        cells=kv,
        k_norm=kv.key_norm,
        frequencies=frequencies,
        out=out,
        other=None,
        partial=Buffer("fixed", 1, size=cut.partial),
        tickets=Table("tickets"),
        positions=Table("positions"),
        sequences=Table("sequences"),
        pages=Table("pages"),
        rings=Table("rings"),
        window=cut.window,
        scale=attention.scale,
        num_cells=layout.num_cells,
        stride=layout.stride,
        most_pages=Table("most_pages"),
        PIECE=PIECE,
        KEYS=KEYS if dim < LONG_HEAD else recording.tiling.long_keys,
        HEADS=attention.heads,
        KV_HEADS=attention.kv_heads,
        GROUP=cut.group,
        KINDS=kv.kinds,
        SLIDING=layout.sliding,
        CELL=layout.kind,
        D=dim,
        HALF=_half(dim),
        OPERAND=recording.operand,
        writes=("out", "other", "partial"),
    )
    return out


@dataclass(frozen=True, slots=True)
class _Cut:
    """How the attention of a step's rows is cut into programs."""

    attention: AttentionSpec
    layout: KVLayout
    area: int  # numbers of a tile of queries

    @property
    def group(self) -> int:
        """Columns of a row: the query heads of a key head, padded."""
        return power(self.attention.heads // self.attention.kv_heads)

    @property
    def window(self) -> int:
        return self.attention.window or NO_WINDOW

    def grid(self, shape: Shape) -> Grid:
        pieces = self._pieces(shape) if shape.few else 1
        return self._tiles(shape), self.attention.kv_heads, pieces

    def settings(self, shape: Shape) -> dict[str, Any]:
        rows, dim = self._rows(shape), self.attention.head_dim
        return {
            "SPREAD": shape.few,
            "BQ": self._columns(shape),
            "most_pieces": self._pieces(shape),
            "tile_first": Table("tile_first", rows),
            "tile_count": Table("tile_count", rows),
            "num_warps": 4 if dim < LONG_HEAD // 2 else 8,
            "num_stages": 2 if dim < LONG_HEAD else 1,
        }

    def partial(self, shape: Shape) -> int:
        """Numbers of the pieces of all sums: two halves of a head, its weight and its peak."""
        if not shape.few:
            return 1
        numbers = 2 * self._columns(shape) * (_half(self.attention.head_dim) + 1)
        return self._tiles(shape) * self.attention.kv_heads * self._pieces(shape) * numbers

    def _rows(self, shape: Shape) -> int:
        area = self.area // (2 * _half(self.attention.head_dim))
        most = min(QUERY_COLUMNS, max(16, area))
        return max(1, min(most // self.group, shape.rows))

    def _columns(self, shape: Shape) -> int:
        return max(16, self._rows(shape) * self.group)

    def _tiles(self, shape: Shape) -> int:
        return tiles_for(shape, self._rows(shape))

    def _pieces(self, shape: Shape) -> int:
        if not self.layout.sliding:
            return max(1, -(-shape.cells // PIECE))
        return -(-(self.window - 1 + self._rows(shape)) // PIECE) + 1


def _half(dim: int) -> int:
    """Numbers of half a head, padded."""
    return max(16, power(dim // 2))


def _stages(dim: int) -> int:
    """Rounds of sums that mix half a head."""
    return max(0, (dim // 2).bit_length() - 1)
