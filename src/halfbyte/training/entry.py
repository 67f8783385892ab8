"""How a new drafter's first projection begins: as the best guess of what its layers are used to.

Its layers begin as copies of the target's last ones, which read the stream that the layers before
them have made. A drafter has only the embedding of a token and the target's final state of the one
before; the least-squares prediction of the stream from these two is a projection, in closed form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.kernels.contract import Rows, Span
from halfbyte.models.decoder import Decoder
from halfbyte.training.passages import Passage
from halfbyte.training.seen import scratch_caches

TOKENS = 16_384
RIDGE = 1e-4  # of the mean second moment


def fitted_entry(target: Decoder, layer: int, passages: Sequence[Passage]) -> Tensor:
    """[H, 2 H]: the stream before `layer` of the target, from a token's embedding and the state of
    the token before it, fitted to the first of the passages."""
    hidden = target.spec.hidden
    inputs = torch.zeros(2 * hidden, 2 * hidden)
    both = torch.zeros(hidden, 2 * hidden)
    count = 0
    for passage in passages:
        stream, known = _seen(target, layer, passage)
        inputs += known.T @ known
        both += stream.T @ known
        count += len(known)
        if count >= TOKENS:
            break
    ridge = RIDGE * inputs.diagonal().mean()
    return torch.linalg.solve(inputs + ridge * torch.eye(2 * hidden), both.T).T.contiguous()


@torch.no_grad()
def _seen(target: Decoder, layer: int, passage: Passage) -> tuple[Tensor, Tensor]:
    """The stream [T - 1, H] before a layer, of all tokens but the first; and what is known of it:
    embeddings and earlier states [T - 1, 2 H]."""
    spans = [Span(start=0, count=len(passage.ids), pages=(), ring=0)]
    rows = Rows(token_ids=passage.ids, spans=spans)
    keys = scratch_caches(target.spec)
    x, inputs = target.enter(rows)
    stream = embedded = x
    for index, weights in enumerate(target.weights.layers):
        if index == layer:
            stream = x
        x = target.attention(x, index, weights, rows, keys[index])
        x = target.feed_forward(x, index, weights, inputs)
    known = torch.cat((embedded[1:], target.leave(x)[:-1]), dim=-1)
    return stream[1:].cpu(), known.cpu()
