"""Where in a model the error arises: how far each layer's output is from the reference's.

Two measures of a layer, both relative to the norm of the reference's state behind it: `own`, what
it does to the reference's own input, and `carried`, where the model has got to by then with the
errors of all layers before. A layer whose `own` stands out deserves more bits; a `carried` that
falls says that later layers make good what earlier ones did.

One layer of either model is decoded at a time, and activations are not rounded: it is the error of
the weights alone. What it is not: a divergence; the final norm and the head are behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.evals.texts import Window
from halfbyte.formats.checkpoint import Source
from halfbyte.kernels.contract import Rows, Span
from halfbyte.models.load import layer_weights
from halfbyte.quantizer.flow import Batch
from halfbyte.quantizer.observed import ObservedOps
from halfbyte.quantizer.outer import outer


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError:
    """|ours - theirs| / |theirs| of the states behind a layer."""

    own: float
    carried: float


class _Path:
    """A model whose layers run one at a time over one batch of windows."""

    def __init__(self, source: Source, rows: Rows) -> None:
        self._source = source
        self._decoder = outer(source, ObservedOps())
        x, inputs = self._decoder.enter(rows)
        self.batch = Batch(rows=rows, x=x, inputs=inputs)

    def layer(self, index: int, *batches: Batch) -> list[Tensor]:
        """The states behind layer `index`, of batches that stand before it."""
        decoder, source = self._decoder, self._source
        packed = {
            tensor.name: decoder.ops.pack(source.tensor(tensor.name))
            for tensor in source.spec.tensors()
            if tensor.name.startswith(f"layers.{index}.")
        }
        weights = layer_weights(packed, source.spec, index)
        found: list[Tensor] = []
        for batch in batches:
            keys = batch.keys_of(source.spec, index)
            x = decoder.attention(batch.x, index, weights, batch.rows, keys)
            found.append(decoder.feed_forward(x, index, weights, batch.inputs))
        return found


def layer_errors(model: Source, reference: Source, windows: Sequence[Window]) -> list[LayerError]:
    """The errors of every layer on these windows, from first to last."""
    spans = [Span(start=0, count=len(w.token_ids), pages=(), ring=0) for w in windows]
    rows = Rows(token_ids=[token for w in windows for token in w.token_ids], spans=spans)
    found: list[LayerError] = []
    with torch.no_grad():
        ours, theirs = _Path(model, rows), _Path(reference, rows)
        for index in range(len(reference.spec.layers)):
            # Its own keys are put aside: the reference's layers go on to read theirs.
            lent = replace(theirs.batch, kept=dict(theirs.batch.kept))
            own, carried = ours.layer(index, lent, ours.batch)
            [right] = theirs.layer(index, theirs.batch)
            norm = float(right.norm())
            found.append(
                LayerError(
                    own=float((own - right).norm()) / norm,
                    carried=float((carried - right).norm()) / norm,
                )
            )
            ours.batch.x, theirs.batch.x = carried, right
    return found
