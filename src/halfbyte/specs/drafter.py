"""What makes a model a drafter: where its input comes from, and which tokens it can propose.

A drafter proposes the next tokens of one target. It is a small decoder whose layers have queries
only: they read keys and values that the target has computed. A step takes a token and a state of
the target's width (the target's own final state at first, afterwards what the step before gave)
and gives logits and the next state. It has no cache and no prefill, and its embedding table is the
target's.

Source: Gemma 4's assistants (Google, 2026), as published in Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CentroidSpec:
    """A head cut into `count` clusters of tokens, of which a step computes the `used` likeliest."""

    count: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """`target_hidden` is the width of the target's embeddings and states.

    The head has `head_rows` rows: one for every token of the vocabulary, or a shortlist whose
    tokens are stored beside it. `target` is the fingerprint of the target that the drafter was
    trained for, None where nobody said.
    """

    target_hidden: int
    head_rows: int
    centroids: CentroidSpec | None = None
    target: str | None = None

    def input_tensors(self, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what stands before the layers: embedding first, then the state."""
        yield "pre.weight", (hidden, 2 * self.target_hidden)

    def output_tensors(self, hidden: int, vocab: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what stands behind the final norm.

        `head.tokens` are the tokens of a shortlist's rows, `centroids.tokens` those of the
        clusters, one cluster after the other: whole numbers.
        """
        yield "head.weight", (self.head_rows, hidden)
        if self.head_rows < vocab:
            yield "head.tokens", (self.head_rows,)
        if self.centroids is not None:
            yield "centroids.weight", (self.centroids.count, hidden)
            yield "centroids.tokens", (vocab,)
        yield "post.weight", (self.target_hidden, hidden)
