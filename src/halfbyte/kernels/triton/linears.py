"""How products with stored weights are recorded (`products` has the kernels).

Products of one input follow each other into one launch, up to three of them where their weights are
alike; a gate and its up projection share one with what comes of both.
"""

from __future__ import annotations

from typing import Any

from halfbyte.kernels.contract import Linear, LowRank
from halfbyte.kernels.triton.layout import Layout, Packed
from halfbyte.kernels.triton.program import Apart, Buffer, Grid, Launch, Shape, Table, power
from halfbyte.kernels.triton.recording import (
    BLOCK,
    Recording,
    Tiling,
    by_block,
    by_row,
    shaped,
)
from halfbyte.specs import Activation

# A weight of fewer tiles than this does not fill a card; its inputs are cut, into pieces of so many
# chunks at least and so many pieces at most.
TILES_THAT_FILL, PIECE_CHUNKS, MOST_PIECES = 512, 8, 8
# Up to so many rows spread the pieces of a sum over programs.
SPREADING = 16
MOST_SEGMENTS = 3
OUTPUTS = 64


def product(
    recording: Recording,
    x: Buffer,
    weight: Packed,
    bias: Packed | None,
    *,
    alone: bool = False,
    softcap: float | None = None,
) -> Buffer:
    """x @ weight.T + bias, in the launch before where that is another product of x; `alone` has a
    launch for itself."""
    out, operand = Buffer(x.axis, weight.shape[0]), recording.as_operand(x)
    alone = alone or bias is not None
    if not alone and _appended(recording, operand, weight, out):
        return out
    launch = recording.launch(
        "product",
        x.axis,
        lambda _: (),
        x=operand,
        weight=weight,
        out=out,
        bias=bias,
        partial=None,
        tickets=Table("tickets"),
        weight1=0,
        weight2=0,
        out1=0,
        out2=0,
        N0=weight.layout.rows,
        N1=0,
        N2=0,
        softcap=softcap,
        SEGMENTS=1,
        **inputs_of(weight),
        OPERAND=recording.operand,
        writes=("out", "partial"),
    )
    recording.shared = None if alone else launch
    cut = _Cut(launch, recording.tiling)
    launch.grid, launch.settings = cut.grid, cut.settings
    if launch.arguments["SPLITS"] > 1:
        launch.arguments["partial"] = Buffer("fixed", 1, size=cut.partial)
    return out


def _appended(recording: Recording, operand: Buffer, weight: Packed, out: Buffer) -> bool:
    """Whether the last launch could take this product along."""
    last = recording.program.launches[-1]
    if last is not recording.shared:
        return False
    arguments, segments = last.arguments, last.arguments["SEGMENTS"]
    wanted = {"x": operand, **inputs_of(weight)}
    if segments == MOST_SEGMENTS or any(arguments[name] != it for name, it in wanted.items()):
        return False
    arguments |= {
        f"weight{segments}": Apart(arguments["weight"], weight, 1),
        f"out{segments}": Apart(arguments["out"], out, 4),
        f"N{segments}": weight.layout.rows,
        "SEGMENTS": segments + 1,
    }
    last.also.append(out)
    return True


def inputs_of(weight: Packed) -> dict[str, Any]:
    """What kernels ask of a weight's inputs: how they are stored, and the pieces of their sums."""
    layout = weight.layout
    piece, pieces = _pieces(layout)
    return {
        "K": layout.width,
        "chunks": layout.chunks,
        "PIECE": piece,
        "SPLITS": pieces,
        "EVEN": layout.chunks * 64 == layout.width,
        **weight.kernel,
    }


def _pieces(layout: Layout) -> tuple[int, int]:
    """Chunks of a piece of the inputs, and the pieces: by the weight's shape alone."""
    pieces = 1
    if layout.tiles < TILES_THAT_FILL:
        pieces = max(1, min(MOST_PIECES, layout.chunks // PIECE_CHUNKS))
    piece = -(-layout.chunks // pieces)
    return piece, -(-layout.chunks // piece)


class _Cut:
    """How a launch of products is cut into programs."""

    def __init__(self, launch: Launch, tiling: Tiling) -> None:
        self._launch = launch
        self._tiling = tiling

    def grid(self, shape: Shape) -> Grid:
        height = self._of(shape)[1]
        tiles = -(-shape.of(self._launch.axis) // height)
        return self._tiles(shape), tiles, self._splits if self._spread(shape) else 1

    def settings(self, shape: Shape) -> dict[str, Any]:
        outputs, height = self._of(shape)
        return {
            "SPREAD": self._spread(shape),
            "BN": outputs,
            "BM": height,
            **self._tiling.warps(height),
        }

    def partial(self, shape: Shape) -> int:
        """Numbers of the pieces of all sums."""
        outputs, height = self._of(shape)
        spread = self._spread(shape)
        return self._tiles(shape) * self._splits * outputs * height if spread else 1

    @property
    def _splits(self) -> int:
        return self._launch.arguments["SPLITS"]

    def _of(self, shape: Shape) -> tuple[int, int]:
        return self._tiling.cut(shape.of(self._launch.axis))

    def _spread(self, shape: Shape) -> bool:
        return self._splits > 1 and shape.of(self._launch.axis) <= SPREADING

    def _tiles(self, shape: Shape) -> int:
        outputs = self._of(shape)[0]
        return sum(-(-self._launch.arguments[name] // outputs) for name in ("N0", "N1", "N2"))


def gated(
    recording: Recording, x: Buffer, gate: Linear, up: Linear, activation: Activation
) -> Buffer:
    """activation(x @ gate.T) * (x @ up.T), of weights that are alike."""
    height, tiling = gate.weight.layout.rows, recording.tiling
    out = Buffer(x.axis, height)

    def grid(shape: Shape) -> Grid:
        outputs, rows = tiling.cut(shape.of(x.axis))
        return -(-height // outputs), -(-shape.of(x.axis) // rows)

    def settings(shape: Shape) -> dict[str, Any]:
        outputs, rows = tiling.cut(shape.of(x.axis))
        return {"BN": outputs, "BM": rows, **tiling.warps(rows)}

    recording.launch(
        "gated",
        x.axis,
        grid,
        settings=settings,
        x=recording.as_operand(x),
        gate=gate.weight,
        up=up.weight,
        gate_bias=gate.bias,
        up_bias=up.bias,
        out=out,
        other=None,
        N=height,
        ACTIVATION=activation,
        **inputs_of(gate.weight),
        OPERAND=recording.operand,
    )
    return out


def gated_by(
    recording: Recording, x: Buffer, by: Buffer, start: int, activation: Activation
) -> Buffer:
    """activation(x) times as many columns of `by`, from `start` on."""
    out = Buffer(x.axis, x.width)
    recording.launch(
        "gated_by",
        x.axis,
        by_block(x.axis, x.width),
        x=x,
        by=by,
        out=out,
        other=None,
        width=x.width,
        by_width=by.width,
        by_start=start,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        OPERAND=recording.operand,
    )
    return out


def update(recording: Recording, y: Buffer, x: Buffer, given: LowRank, adapter: int) -> None:
    """Adds an adapter's update to the rows of y that are its own, in f32."""
    rank, inner = given.a.shape[0], Buffer(x.axis, given.a.shape[0])
    recording.launch(
        "narrow",
        x.axis,
        by_row(x.axis, rank),
        x=x,
        a=given.a,
        inner=inner,
        adapters=Table("adapters"),
        adapter=adapter,
        K=x.width,
        rank=rank,
        **shaped(given.a),
        BLOCK=BLOCK,
        writes=("inner",),
    )
    recording.launch(
        "widened",
        x.axis,
        by_row(x.axis, -(-y.width // OUTPUTS)),
        inner=inner,
        b=given.b,
        out=y,
        adapters=Table("adapters"),
        adapter=adapter,
        scale=given.scale,
        N=y.width,
        rank=rank,
        **shaped(given.b),
        BLOCK=OUTPUTS,
        RANK=power(rank),
        writes=("out",),
    )
