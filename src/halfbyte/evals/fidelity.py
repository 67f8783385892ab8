"""How well a decoder predicts a text, and how closely it follows a reference decoder.

Perplexity says how well; the Kullback-Leibler divergence of the full next-token distributions,
KL(reference || model) in nats per token, says how closely, and far more sensitively: errors that
cancel in a perplexity do not cancel in it. Both models read the same window side by side, and what
is kept of a row are four numbers; the logits of a text never exist at once.

Exact: full vocabulary, log-probabilities in f64. What it is not: a task score. Perplexities compare
only within one protocol, one text and one tokenizer. Sources: "Accuracy is not all you need"
(arXiv 2407.09141) and the definitions of llama-perplexity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import InvalidInputError
from halfbyte.evals.positions import Profile, profile
from halfbyte.evals.reader import Reader
from halfbyte.evals.texts import Protocol, Text, Window, cut
from halfbyte.models.decoder import Decoder
from halfbyte.specs import KVType

TILE = 1 << 20  # logits in f64 at once; a few temporaries of this size exist at a time

Progress = Callable[[int, int], None]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """KL(reference || model) over the scored tokens, in nats."""

    mean: float
    mean_error: float
    median: float
    p90: float
    p99: float
    p999: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What was measured on one text; the last four are None without a reference.

    `tokens` were scored. `same_top1` is the fraction of them for which both models think the same
    token the likeliest. The two errors, of the perplexity and of the mean KL, are standard errors
    that take the tokens as independent; they are NaN for a single token.
    """

    name: str
    tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    kl: Divergence | None = None
    same_top1: float | None = None
    kl_by_position: Profile | None = None


def measure(
    decoder: Decoder,
    text: Text,
    *,
    reference: Decoder | None = None,
    protocol: Protocol = "llama.cpp",
    window: int = 512,
    max_windows: int | None = None,
    kv: KVType = "f32",
    progress: Progress | None = None,
) -> Fidelity:
    """The fidelity of a decoder on a text, or on the first `max_windows` windows of it.

    `kv` is the cache of the model that is measured; the reference keeps its keys in f32.
    `progress(windows done, windows in all)` is called after each window. Raises
    `InvalidInputError` for a text shorter than a window, a window beyond a model's context, and a
    reference with another vocabulary.
    """
    windows = cut(text, protocol=protocol, window=window)[:max_windows]
    readers = [Reader(decoder, window, kv)]
    if reference is not None:
        readers.append(Reader(reference, window, "f32"))
        _check_vocabularies(readers)
    scores: list[Floats] = []
    for done, piece in enumerate(windows, 1):
        scores.extend(_scores(readers, piece))
        if progress is not None:
            progress(done, len(windows))
    rows = np.concatenate(scores)
    found = summarize(text.name, rows)
    if reference is None:
        return found
    positions = np.tile(np.arange(windows[0].first, window - 1), len(windows))
    narrowest = min(reference.spec.windows, default=None)
    return replace(found, kl_by_position=profile(rows[:, 2], positions, narrowest))


def _check_vocabularies(readers: Sequence[Reader]) -> None:
    if len({reader.vocab for reader in readers}) > 1:
        sizes = " and ".join(str(reader.vocab) for reader in readers)
        raise InvalidInputError(
            f"the model and the reference have vocabularies of {sizes} tokens",
            hint="the reference must be the model that this one was made from",
        )


def _scores(readers: Sequence[Reader], window: Window) -> Iterator[Floats]:
    """The scores of a window, tile by tile."""
    targets = np.asarray(window.targets)
    start = 0
    for pieces in zip(*(reader.logits(window) for reader in readers), strict=True):
        step = max(1, TILE // readers[0].vocab)
        for low in range(0, len(pieces[0]), step):
            tiles = [piece[low : low + step] for piece in pieces]
            stop = start + len(tiles[0])
            yield score_rows(targets[start:stop], *tiles)
            start = stop


def score_rows(
    targets: NDArray[np.integer[Any]],
    logits: NDArray[np.float32],
    reference: NDArray[np.float32] | None = None,
) -> Floats:
    """What is kept of each row [R, V] of logits: [R, 1], or [R, 4] with a reference.

    The columns: -log p of the target [R], that of the reference, KL(reference || model), and 1 for
    the same arg max or 0.
    """
    rows = np.arange(len(targets))
    log_p = log_softmax(logits)
    if reference is None:
        return -log_p[rows, targets][:, None]
    log_r = log_softmax(reference)
    divergence = np.einsum("rv,rv->r", np.exp(log_r), log_r - log_p)
    same = logits.argmax(-1) == reference.argmax(-1)
    return np.stack([-log_p[rows, targets], -log_r[rows, targets], divergence, same], axis=1)


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Log-probabilities [R, V] in f64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def summarize(name: str, scores: Floats) -> Fidelity:
    """The scores [tokens, 1 or 4] of a text as its numbers."""
    loss, *against = scores.T
    perplexity = exp(loss.mean())
    reference_loss, kl, same = against or (None, None, None)
    return Fidelity(
        name=name,
        tokens=len(loss),
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(loss),
        reference_perplexity=None if reference_loss is None else exp(reference_loss.mean()),
        kl=None if kl is None else _divergence(kl),
        same_top1=None if same is None else float(same.mean()),
    )


def _divergence(kl: Floats) -> Divergence:
    median, p90, p99, p999 = (float(q) for q in np.quantile(kl, (0.5, 0.9, 0.99, 0.999)))
    return Divergence(
        mean=float(kl.mean()),
        mean_error=_standard_error(kl),
        median=median,
        p90=p90,
        p99=p99,
        p999=p999,
        max=float(kl.max()),
    )


def _standard_error(values: Floats) -> float:
    """Of the mean of the values."""
    return float(values.std(ddof=1)) / sqrt(len(values)) if len(values) > 1 else nan
