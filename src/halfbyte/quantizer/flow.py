"""The calibration windows on their way through a model: their states between two half layers.

Every window is a whole sequence, attended to at once, so there is no cache to speak of; only the
keys and values that a later layer reads too are kept. The states of all windows lie in main memory,
or in a file without a name (it is gone when the process is) where they would take too much of it.
On the device is one batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from halfbyte.formats.atomic import require_space, write_errors
from halfbyte.kernels.contract import Rows, Span
from halfbyte.kernels.reference.kv import ScratchKV
from halfbyte.models.decoder import Decoder
from halfbyte.specs import ModelSpec

# Enough for a product to be worth its weights; what is made of them stays in the caches' reach.
BATCH_TOKENS = 1024
IN_MEMORY = 4 << 30  # bytes of states; more of them go to the disk


@dataclass(slots=True, kw_only=True)
class Batch:
    """Some of the windows. `x` [R, H] are their states, `inputs` their embeddings per layer.

    `kept` are the keys and values, by layer, that later layers read. `known` are inputs of weights
    of the half layer that is being solved, by name: all that comes before them is final.
    """

    rows: Rows
    x: Tensor
    inputs: Tensor | None = None
    kept: dict[int, ScratchKV] = field(default_factory=dict[int, ScratchKV])
    known: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def keys_of(self, spec: ModelSpec, index: int) -> ScratchKV:
        """Where layer `index` writes and reads keys and values."""
        source = spec.layers[index].kv_source
        if source is not None:
            return self.kept[source]
        keys = ScratchKV()
        if any(layer.kv_source == index for layer in spec.layers):
            self.kept[index] = keys
        return keys


class Flow:
    """All windows, in batches of `at_once` (by default some thousand tokens).

    `folder` takes the states that memory should not. `every_layer`: the states before each are
    kept, and count.
    """

    def __init__(
        self,
        spec: ModelSpec,
        windows: Sequence[Sequence[int]],
        folder: Path,
        *,
        in_memory: int = IN_MEMORY,
        at_once: int | None = None,
        every_layer: bool = False,
    ) -> None:
        tokens = sum(len(window) for window in windows)
        per_layer = 0 if spec.per_layer is None else len(spec.layers) * spec.per_layer.width
        widest = max(max(layer.mlp.width, layer.attention.query_width) for layer in spec.layers)
        states = spec.hidden * (1 + every_layer * (len(spec.layers) + 1))  # and gradients
        spills = 4 * tokens * (states + per_layer + widest) > in_memory
        self._folder = folder if spills else None
        count = at_once or max(1, BATCH_TOKENS // max(map(len, windows)))
        self.batches = [
            self._batch(spec, windows[start : start + count])
            for start in range(0, len(windows), count)
        ]

    def enter(self, decoder: Decoder) -> None:
        """Every window's embeddings become its states."""
        for batch in self.batches:
            x, inputs = decoder.enter(batch.rows)
            batch.x.copy_(x)
            if inputs is not None:
                batch.inputs = self.allocate(inputs.shape).copy_(inputs)

    def allocate(self, shape: Sequence[int]) -> Tensor:
        """Room for f32 numbers, in memory or on the disk as the states are.

        Raises `DoesNotFitError` where the disk has none.
        """
        if self._folder is None:
            return torch.empty(tuple(shape))
        size = 4 * prod(shape)
        with write_errors(self._folder), tempfile.TemporaryFile(dir=self._folder) as file:
            require_space(self._folder, size)
            os.posix_fallocate(file.fileno(), 0, size)
            return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=tuple(shape)))

    def _batch(self, spec: ModelSpec, windows: Sequence[Sequence[int]]) -> Batch:
        spans = [Span(start=0, count=len(window), pages=(), ring=0) for window in windows]
        rows = Rows(token_ids=[token for window in windows for token in window], spans=spans)
        return Batch(rows=rows, x=self.allocate((len(rows.token_ids), spec.hidden)))
