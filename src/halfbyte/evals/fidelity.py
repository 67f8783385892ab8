"""How well a decoder predicts a text, and how closely it follows a reference.

Perplexity says how well; the Kullback-Leibler divergence of the full next-token distributions,
KL(reference || model) in nats per token, says how closely, and far more sensitively: errors that
cancel in a perplexity do not cancel in it. The change of the right token's probability says which
way it goes: changes to both sides are noise, changes to one are damage. Of a row four numbers are
kept; the logits of a text never exist at once.

Exact: full vocabulary, log-probabilities in f64. What it is not: a task score. Perplexities compare
only within one protocol, one text and one tokenizer. Sources: "Accuracy is not all you need"
(arXiv 2407.09141) and the definitions of llama-perplexity, whose statistics these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, nan, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import InvalidInputError
from halfbyte.evals.positions import Profile, profile
from halfbyte.evals.reader import Reader
from halfbyte.evals.reference import Baseline
from halfbyte.evals.texts import Window
from halfbyte.formats.progress import Progress
from halfbyte.models.decoder import Decoder
from halfbyte.specs import KVType

TILE = 1 << 20  # logits in f64 at once; a few temporaries of this size exist at a time

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
class Change:
    """The model's probability of the right token less the reference's, over the scored tokens.

    As far below zero as above it is noise; further below is damage.
    """

    mean: float
    mean_error: float
    rms: float
    p1: float
    p5: float
    median: float
    p95: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """What was measured on one text; what follows the perplexity's error needs a reference.

    `tokens` were scored. `same_top1` is the fraction of them for which both models think the same
    token the likeliest. The errors are standard errors that take the tokens as independent (that of
    the ratio of perplexities pairs them); they are NaN for a single token.
    """

    name: str
    tokens: int
    perplexity: float
    perplexity_error: float
    reference_perplexity: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    kl: Divergence | None = None
    same_top1: float | None = None
    right_token: Change | None = None
    kl_by_position: Profile | None = None


def measure(
    decoder: Decoder,
    windows: Sequence[Window],
    *,
    name: str,
    reference: Baseline | None = None,
    kv: KVType = "f32",
    progress: Progress | None = None,
) -> Fidelity:
    """The fidelity of a decoder on the windows of a text, against what a reference made of them.

    `kv` is the cache of the model that is measured. `progress(windows done, windows in all)` is
    called after each. Raises `InvalidInputError` for a window beyond the model's context, and a
    reference with another vocabulary.
    """
    longest = max(len(window.token_ids) for window in windows)
    reader = Reader(decoder, longest, kv)
    if reference is not None:
        _check_vocabularies(decoder.spec.vocab, reference.spec.vocab)
    scores: list[Floats] = []
    start = 0
    for done, window in enumerate(windows, 1):
        scores.extend(_scores(reader, window, reference, start))
        start += len(window.targets)
        if progress is not None:
            progress(done, len(windows))
    rows = np.concatenate(scores)
    found = summarize(name, rows)
    if reference is None:
        return found
    positions = np.concatenate([np.arange(w.first, len(w.token_ids) - 1) for w in windows])
    narrowest = min(reference.spec.windows, default=None)
    return replace(found, kl_by_position=profile(rows[:, 2], positions, narrowest))


def _check_vocabularies(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise InvalidInputError(
            f"the model and the reference have vocabularies of {ours} and {theirs} tokens",
            hint="the reference must be the model that this one was made from",
        )


def _scores(
    reader: Reader, window: Window, reference: Baseline | None, start: int
) -> Iterator[Floats]:
    """The scores of a window, tile by tile; its first scored row is row `start` of the text."""
    targets = np.asarray(window.targets)
    step = max(1, TILE // reader.width)
    done = 0
    for piece in reader.rows(window):
        known = None
        if reference is not None:
            known = reference.logits(start + done, start + done + len(piece))
        for low in range(0, len(piece), step):
            tile = slice(low, low + step)
            wanted = targets[done + low : done + min(low + step, len(piece))]
            yield score_rows(wanted, piece[tile], None if known is None else known[tile])
        done += len(piece)


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
    loss = scores[:, 0]
    perplexity = exp(loss.mean())
    found = Fidelity(
        name=name,
        tokens=len(loss),
        perplexity=perplexity,
        perplexity_error=perplexity * _standard_error(loss),
    )
    return found if scores.shape[1] == 1 else _compared(found, *scores.T)


def _compared(
    found: Fidelity, loss: Floats, reference_loss: Floats, kl: Floats, same: Floats
) -> Fidelity:
    ratio = exp((loss - reference_loss).mean())
    return replace(
        found,
        reference_perplexity=exp(reference_loss.mean()),
        perplexity_ratio=ratio,
        perplexity_ratio_error=ratio * _standard_error(loss - reference_loss),
        kl=_divergence(kl),
        same_top1=float(same.mean()),
        right_token=_change(np.exp(-loss) - np.exp(-reference_loss)),
    )


def _change(change: Floats) -> Change:
    p1, p5, median, p95, p99 = (
        float(q) for q in np.quantile(change, (0.01, 0.05, 0.5, 0.95, 0.99))
    )
    return Change(
        mean=float(change.mean()),
        mean_error=_standard_error(change),
        rms=sqrt(float(np.square(change).mean())),
        p1=p1,
        p5=p5,
        median=median,
        p95=p95,
        p99=p99,
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
