"""A recorded forward that runs: laid out in memory for each shape of step, launched, and on a GPU
replayed as a CUDA graph.

What differs from step to step (tokens, positions, pages, which rows there are) is written into
tables on the device, in one copy; the kernels read lengths from there. So a shape is bound once:
its buffers lie in one workspace, taken when the step is prepared, and nothing is allocated after.
A shape's first run compiles its kernels and launches them one by one, its second records a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.errors import OutOfMemoryError
from halfbyte.kernels.contract import Choice, Draw, Rows
from halfbyte.kernels.triton import choosing, heads, products, routing, rows, tables
from halfbyte.kernels.triton.cells import TritonKV
from halfbyte.kernels.triton.device import Device
from halfbyte.kernels.triton.layout import Packed
from halfbyte.kernels.triton.packing import TYPES
from halfbyte.kernels.triton.program import (
    Apart,
    Buffer,
    Launch,
    Place,
    Program,
    Shape,
    Table,
    bucket,
    usual,
)
from halfbyte.kernels.triton.tables import Key

Ready = tuple[Any, tuple[int, ...], dict[str, Any]]  # a kernel, its grid, its arguments

KERNELS: dict[str, Any] = {
    "attended": heads.attended,
    "banned": choosing.banned,
    "chosen": routing.chosen,
    "decided": choosing.decided,
    "drawn": choosing.drawn,
    "embedded": products.embedded,
    "filled": rows.filled,
    "gated": products.gated,
    "gated_by": rows.gated_by,
    "joined": rows.joined,
    "layer_inputs": rows.layer_inputs,
    "listed": routing.listed,
    "measured": choosing.measured,
    "mixed_entries": routing.mixed,
    "mixed_heads": heads.mixed,
    "narrow": products.narrow,
    "normed": rows.normed,
    "peaked": choosing.peaked,
    "placed": rows.placed,
    "product": products.product,
    "routed": products.routed,
    "turned": heads.turned,
    "widened": products.widened,
}
WIDE_TYPES = {"i32": torch.int32, "i64": torch.int64, "f64": torch.float64}
# Tiles whose pieces are gathered in one launch, at most.
TICKETS = 1 << 14
# A graph is recorded at this run of a shape: at the first one its kernels are compiled.
RUNS_OF_A_GRAPH = 2
# So many shapes are kept ready.
READY = 64


@dataclass(slots=True)
class Bound:
    """A shape ready to run. `tail` chooses tokens; there is a graph with it and one without."""

    launches: list[Ready]
    tail: list[Ready]
    outputs: list[Tensor]
    tokens: Tensor | None
    slices: dict[Key, slice]
    runs: dict[bool, int] = field(default_factory=dict[bool, int])
    graphs: dict[bool, Any] = field(default_factory=dict[bool, Any])


@dataclass(slots=True)
class Workspace:
    """The memory of a step: buffers, the tables and their copy on the host, states from outside.

    `copied` happens when the device has read the host's tables.
    """

    buffers: Tensor
    tables: Tensor
    host: Tensor
    states: Tensor
    tickets: Tensor
    copied: Any
    bound: dict[Shape, Bound] = field(default_factory=dict[Shape, Bound])

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of buffers, numbers of tables, rows of states."""
        return len(self.buffers), len(self.tables), len(self.states)


class TritonStep:
    """A recorded step on a device. What it returns may be overwritten by its next run."""

    def __init__(self, program: Program, device: Device) -> None:
        self._program = program
        self._device = device
        self._workspace: Workspace | None = None

    def prepare(self, rows: int, wanted: int, spans: int) -> None:
        """Takes the memory of all steps up to this size, so that none of them takes any.

        On a card, the kernels of the usual ones are compiled and their graphs recorded.
        """
        most = bucket(max(rows, 1), max(wanted, 1), max(spans, 1), self._program.cells)
        size = self._program.nbytes(most.rows, most.wanted, most.spans, most.cells)
        self._grow(size, tables.slices_of(self._program, most)[1], most.rows)
        for shape in () if self._device.interpreted else usual(most):
            for _ in range(1 if shape == most else RUNS_OF_A_GRAPH):
                self.idle(shape)

    def idle(self, shape: Shape) -> None:
        """A step of no rows: what the shape needs is compiled or recorded, nothing is computed."""
        with self._device.current():
            space, bound = self._bound_to(shape)
            space.tables.zero_()
            self._launch(bound, self._program.tokens is not None)

    def _grow(self, *sizes: int) -> Workspace:
        """A workspace of these sizes at least (`Workspace.sizes`)."""
        space, self._workspace = self._workspace, None
        if space is not None:
            sizes = tuple(map(max, sizes, space.sizes))
            if sizes == space.sizes:
                self._workspace = space
                return space
        del space  # before a larger one is taken
        try:
            self._workspace = found = self._taken(*sizes)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no memory for steps of {sizes[2]} rows: {sizes[0] / 2**20:.0f} MiB",
                hint="lower --context or the number of sequences, or plan with --budget",
            ) from error
        return found

    def _taken(self, size: int, numbers: int, rows: int) -> Workspace:
        device, on_card = self._device.name, not self._device.interpreted
        return Workspace(
            buffers=torch.empty(size, dtype=torch.uint8, device=device),
            tables=torch.zeros(numbers, dtype=torch.int32, device=device),
            host=torch.zeros(numbers, dtype=torch.int32, pin_memory=on_card),
            states=torch.zeros((rows, self._program.states_width), device=device),
            tickets=torch.zeros(TICKETS, dtype=torch.int32, device=device),
            copied=torch.cuda.Event() if on_card else None,
        )

    def __call__(self, rows: Rows, wanted: Sequence[int]) -> list[NDArray[np.float32]]:
        bound = self._run(rows, wanted, None)
        count = len(self._program.outputs)
        return [self._fetched(bound, index, rows, wanted) for index in range(count)]

    def able(self, draws: Sequence[Draw]) -> bool:
        """Whether tokens of these draws can be chosen on the device."""
        possible = self._program.tokens is not None
        return possible and all(tables.drawable(draw.sampling) for draw in draws)

    def choose(
        self, rows: Rows, wanted: Sequence[int], draws: Sequence[Draw], *, states: bool
    ) -> Choice:
        """A step, the tokens that its logits choose, and where asked for the states of its rows."""
        bound = self._run(rows, wanted, draws)
        assert bound.tokens is not None, "this step chooses nothing"
        found = bound.tokens[: 2 * len(wanted)].view(-1, 2).cpu().numpy()
        return Choice(
            tokens=found[:, 0].tolist(),
            margins=found[:, 1].view(np.float32),
            states=self._fetched(bound, 1, rows, wanted) if states else None,
        )

    def _fetched(
        self, bound: Bound, index: int, rows: Rows, wanted: Sequence[int]
    ) -> NDArray[np.float32]:
        buffer = self._program.outputs[index]
        count = len(rows.token_ids) if buffer.axis == "rows" else len(wanted)
        return bound.outputs[index][:count].cpu().numpy()

    def _run(self, rows: Rows, wanted: Sequence[int], draws: Sequence[Draw] | None) -> Bound:
        """Computes a step; its outputs are on the device."""
        counts = len(rows.token_ids), len(wanted), len(rows.spans)
        with self._device.current():
            space, bound = self._bound_to(bucket(*counts, self._program.cells))
            values = tables.values_of(rows, wanted, self._program.most_pages, bound.slices)
            _write(space, bound.slices, values | ({} if draws is None else tables.draws_of(draws)))
            if rows.states is not None:
                given = torch.as_tensor(rows.states, dtype=torch.float32)
                space.states[: len(given)].copy_(given)
            self._launch(bound, draws is not None)
        return bound

    def _launch(self, bound: Bound, chooses: bool) -> None:
        launches = [*bound.launches, *bound.tail] if chooses else bound.launches
        bound.runs[chooses] = bound.runs.get(chooses, 0) + 1
        if self._device.interpreted or bound.runs[chooses] < RUNS_OF_A_GRAPH:
            _launch_all(launches)
            return
        if chooses not in bound.graphs:
            bound.graphs[chooses] = graph = torch.cuda.CUDAGraph()
            # Other threads may go on to ask the card for its memory.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                _launch_all(launches)
        bound.graphs[chooses].replay()

    def _bound_to(self, shape: Shape) -> tuple[Workspace, Bound]:
        """The shape, laid out in the workspace; a larger one is taken if it does not fit."""
        if self._workspace is None or shape not in self._workspace.bound:
            self._lay_out(shape)
        assert self._workspace is not None, "a shape is laid out in a workspace"
        return self._workspace, self._workspace.bound[shape]

    def _lay_out(self, shape: Shape) -> None:
        placed, size = self._program.places(shape)
        slices, numbers = tables.slices_of(self._program, shape)
        space = self._grow(size, numbers, shape.rows)
        if len(space.bound) >= READY:
            space.bound.pop(next(iter(space.bound)))
        space.bound[shape] = _Binder(self._program, shape, placed, slices, space).bound()


@dataclass(frozen=True, slots=True)
class _Binder:
    """Turns recorded arguments into what a kernel is called with."""

    program: Program
    shape: Shape
    placed: Mapping[int, Place]
    slices: dict[Key, slice]
    space: Workspace

    def bound(self) -> Bound:
        program, shape = self.program, self.shape
        outputs = [
            self.tensor(buffer)[: shape.of(buffer.axis) * buffer.width].view(-1, buffer.width)
            for buffer in program.outputs
        ]
        return Bound(
            self.ready(program.launches),
            self.ready(program.tail),
            outputs,
            None if program.tokens is None else self.tensor(program.tokens),
            self.slices,
        )

    def ready(self, launches: Sequence[Launch]) -> list[Ready]:
        """The launches that the shape has anything to do for."""
        found: list[Ready] = []
        for launch in launches:
            grid = launch.grid(self.shape)
            if all(grid):
                arguments = {**launch.arguments, **launch.settings(self.shape)}
                values = {name: self.value(value) for name, value in arguments.items()}
                found.append((KERNELS[launch.kernel], grid, values))
        return found

    def value(self, value: Any) -> Any:
        if isinstance(value, Buffer):
            return self.tensor(value)
        if isinstance(value, (Packed, TritonKV)):
            return value.data
        if isinstance(value, Table):
            return self.table(value)
        if isinstance(value, Apart):
            apart = self.value(value.there).data_ptr() - self.value(value.here).data_ptr()
            return apart // value.itemsize
        return value

    def tensor(self, buffer: Buffer) -> Tensor:
        place = self.placed[id(buffer)]
        room = self.space.buffers[place.offset : place.offset + place.nbytes]
        if buffer.number in WIDE_TYPES:
            return room.view(WIDE_TYPES[buffer.number])
        return room.view(TYPES[buffer.kind(self.program.operand_type)])

    def table(self, table: Table) -> Any:
        if table.name == "states":
            return self.space.states
        if table.name == "tickets":
            return self.space.tickets
        if table.name in ("most_pages", "states_width"):
            return getattr(self.program, table.name)
        return self.space.tables[self.slices[table.name, table.tile]]


def _launch_all(launches: Sequence[Ready]) -> None:
    for kernel, grid, arguments in launches:
        kernel[grid](**arguments, enable_fp_fusion=False)


def _write(space: Workspace, slices: Mapping[Key, slice], values: tables.Values) -> None:
    """Puts the tables on the device, in one copy."""
    if space.copied is not None:
        space.copied.synchronize()  # the copy before may not have read the host's yet
    host = space.host.numpy()
    for key, numbers in values.items():
        start = slices[key].start
        host[start : start + len(numbers)] = numbers
    used = max(place.stop for place in slices.values())
    space.tables[:used].copy_(space.host[:used], non_blocking=True)
    if space.copied is not None:
        space.copied.record()
