"""A drafter beside its target: a step of it reads the target's keys and values and writes none.

A row is one sequence. It stands at the last position that the target has committed and sees nothing
that was rejected; its queries are rotated as the spec says (`ahead`). All steps of a round stand at
the same position; what changes are the token and the state.

Source: Gemma 4's assistants, as run by Transformers (`SinglePositionMultiTokenCandidateGenerator`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.kernels.contract import (
    Array,
    Choice,
    Choosing,
    Draw,
    Linear,
    Preparing,
    Rows,
    Span,
    Step,
)
from halfbyte.models.cache import Cache, Slot
from halfbyte.models.decoder import Decoder
from halfbyte.specs import ModelSpec

Floats = NDArray[np.float32]


class DraftModel:
    """The drafter of a target.

    `body` is its layers, norm and head, with the target's embedding; `reads` the target's layer
    whose cache each of its layers reads. `tokens` are the tokens of the head's rows where these are
    not the vocabulary in order.
    """

    def __init__(
        self,
        body: Decoder,
        *,
        pre: Linear,
        post: Linear,
        centroids: Linear | None,
        tokens: NDArray[np.intp] | None,
        target: ModelSpec,
        reads: Sequence[int],
    ) -> None:
        self.spec = body.spec
        self.target = target
        self._body = body
        self._pre, self._post, self._centroids = pre, post, centroids
        self._tokens = tokens
        self.reads = tuple(reads)
        self._cache: Cache | None = None
        self._step: Step | None = None

    def forward(
        self, token_ids: Sequence[int], states: Floats, slots: Sequence[Slot], cache: Cache
    ) -> tuple[Floats, Floats]:
        """One step of several sequences: logits [R, V] of their next tokens, next states [R, H].

        states [R, H], H of the target. A token that the head does not hold has the logit -inf. What
        is returned may be overwritten by the next step.
        """
        step = self._ready(cache, len(slots))
        logits, states = step(_rows(token_ids, states, slots), range(len(slots)))
        return self._spread(logits), states

    def choose(
        self,
        token_ids: Sequence[int],
        states: Floats,
        slots: Sequence[Slot],
        cache: Cache,
        draws: Sequence[Draw],
    ) -> Choice | None:
        """One step of several sequences, and the tokens it chooses on the device.

        None, and nothing computed, where the op set does not choose or not so. Noise is a token's;
        where the head's rows are not the vocabulary in order, only what needs none is chosen there.
        """
        step = self._ready(cache, len(slots))
        plain = self._tokens is None or all(
            it.sampling.temperature == 0 and not it.sampling.suppress for it in draws
        )
        if not plain or not isinstance(step, Choosing) or not step.able(draws):
            return None
        rows = _rows(token_ids, states, slots)
        found = step.choose(rows, range(len(slots)), draws, states=True)
        if (held := self._tokens) is None:
            return found
        return replace(found, tokens=[it if it < 0 else int(held[it]) for it in found.tokens])

    def _ready(self, cache: Cache, sequences: int) -> Step:
        """The step over these cells."""
        step = self._step if self._cache is cache else None
        return step or self.prepare(cache, sequences)

    def prepare(self, cache: Cache, sequences: int) -> Step:
        """Records the step over these cells, for up to so many sequences."""
        self._cache, self._step = cache, self.recorded(cache)
        if isinstance(self._step, Preparing):
            self._step.prepare(sequences, sequences, sequences)
        return self._step

    def recorded(self, cache: Cache) -> Step:
        """A step that reads these cells."""
        caches = [cache.layers[index] for index in self.reads]
        return self._body.ops.step(lambda rows, _: self.step(rows, caches))

    def step(self, rows: Rows, caches: Sequence[Array]) -> tuple[Array, Array]:
        """The graph of a step; `caches` are those that the layers read. Logits are the head's."""
        x = self.states(rows, caches)
        return self._logits(x), self.handed_on(x)

    def states(self, rows: Rows, caches: Sequence[Array]) -> Array:
        """The drafter's own final states [R, d], normed, that its head is applied to."""
        ops, body, hidden = self._body.ops, self._body, self.target.hidden
        x = ops.concat(
            ops.embed(rows, body.weights.embed, self.target.embed_scale), ops.given(rows, hidden)
        )
        x = ops.linear(x, self._pre)
        for index, weights in enumerate(body.weights.layers):
            x = body.attention(x, index, weights, rows, caches[index])
            x = body.feed_forward(x, index, weights, None)
        return body.leave(x)

    def handed_on(self, x: Array) -> Array:
        """The states [R, H] that the next step begins with."""
        return self._body.ops.linear(x, self._post)

    def _logits(self, x: Array) -> Array:
        centroids = self.spec.drafter.centroids if self.spec.drafter else None
        if self._centroids is None or centroids is None:
            return self._body.logits(x)
        scores = self._body.ops.linear(x, self._centroids)
        head = self._body.weights.head
        return self._body.ops.clustered_logits(x, scores, head, centroids.used)

    def _spread(self, logits: Floats) -> Floats:
        """Logits of the head's rows as logits of the vocabulary."""
        if self._tokens is None:
            return logits
        spread = np.full((len(logits), self.spec.vocab), -np.inf, dtype=np.float32)
        for row, given in zip(spread, logits, strict=True):
            held = np.flatnonzero(given > -np.inf)
            row[self._tokens[held]] = given[held]
        return spread


def _rows(token_ids: Sequence[int], states: Floats, slots: Sequence[Slot]) -> Rows:
    """A row of every sequence, at the last position that it has committed."""
    spans = [
        Span(start=slot.length - 1, count=1, pages=slot.pages, ring=slot.ring) for slot in slots
    ]
    return Rows(token_ids=token_ids, spans=spans, states=states.copy())
