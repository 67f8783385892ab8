"""From one row of logits to one token: filters, then the arg max of log-probability plus noise.

In this order: repetition, presence and frequency penalties, bias, ids that are suppressed or ruled
out by a guide, (temperature 0: the arg max, lowest id wins a
tie), temperature, top-k, top-p, min-p, noise. Each filter sees what the one before it left, and
probabilities are those of the survivors: with top-k, top-p is a share of their mass. Among equal
logits the lowest ids survive. Log-probabilities are float64 and need no normalisation, because a
constant does not move the arg max.

Choosing with Gumbel noise is exact sampling (Gumbel-max trick; Maddison, Tarlow, Minka 2014), and
the noise is a function of the request and the position (`noise`). So the token is a pure function
of the logits and the request: a draft can be verified by equality.

The vocabulary is never sorted: a partition or a bound finds the few that can matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from halfbyte.engine.noise import SPAN, gumbel
from halfbyte.errors import HalfbyteError, InvalidInputError
from halfbyte.specs import SamplingParams

Logits = NDArray[np.float32]
Weights = NDArray[np.float64]
Ids = NDArray[np.intp]

_GROUP = 64


class NothingLeftError(InvalidInputError):
    """Every token is suppressed or ruled out."""


def sample(
    logits: Logits,
    params: SamplingParams,
    *,
    sequence: int,
    position: int,
    history: Collection[int],
    chosen: Collection[int] = (),
    allowed: bytes | None = None,
) -> int:
    """The token at `position` of a sequence, from its row of logits [vocab].

    `sequence` and `position` are those of `noise`; `history` holds the ids before `position` and
    is read only for a repetition penalty, `chosen` those after the prompt, for the other two.
    `allowed` is a guide's (see `Guide`). Logits that are not finite raise `HalfbyteError`; -inf
    is allowed, as a token that cannot be. Raises `NothingLeftError` where nothing can be chosen.
    """
    _check(logits)
    scores = _adjusted(logits, params, history, chosen, allowed)
    if params.temperature == 0:
        return int(np.argmax(scores))
    ids, weights = survivors(scores, params)
    able = weights >= -SPAN
    ids, weights = ids[able], weights[able]
    noise = gumbel(ids, seed=params.seed, sequence=sequence, position=position)
    return int(ids[np.argmax(weights + noise)])


def survivors(scores: Logits, params: SamplingParams) -> tuple[Ids, Weights]:
    """Temperature and filters: the ids that may be chosen, ascending, and their log-weights.

    A log-weight is a log-probability up to a constant; the best one is 0.
    """
    ids = np.arange(len(scores)) if params.top_k == 0 else np.sort(_largest(scores, params.top_k))
    kept = scores[ids].astype(np.float64)
    weights = (kept - kept.max()) / params.temperature
    if params.top_p < 1:
        nucleus = np.sort(_nucleus(weights, params.top_p))
        ids, weights = ids[nucleus], weights[nucleus]
    if params.min_p > 0:
        likely = np.exp(weights) >= params.min_p
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def not_logits(instead: object) -> HalfbyteError:
    """The error of a row that nothing can be chosen from."""
    return HalfbyteError(
        f"the model produced {instead} instead of logits",
        hint="the weights may be damaged ('halfbyte verify'), or the type too narrow "
        "('--dtype f32')",
    )


def _check(logits: Logits) -> None:
    best = logits.max()
    if not np.isfinite(best):
        raise not_logits("NaN" if np.isnan(best) else best)


def _adjusted(
    logits: Logits,
    params: SamplingParams,
    history: Collection[int],
    chosen: Collection[int],
    allowed: bytes | None,
) -> Logits:
    counts = params.presence_penalty != 0 or params.frequency_penalty != 0
    untouched = params.repetition_penalty == 1 and not (params.suppress or params.bias or counts)
    if untouched and allowed is None:
        return logits
    scores = logits.copy()
    if params.repetition_penalty != 1:
        seen = list(set(history))
        values = scores[seen]
        penalty = params.repetition_penalty
        scores[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counts and chosen:
        times = Counter(chosen)
        often = np.fromiter(times.values(), dtype=np.float32)
        scores[list(times)] -= params.presence_penalty + params.frequency_penalty * often
    for token, value in params.bias:
        scores[token] += value
    scores[list(params.suppress)] = -np.inf
    if allowed is not None:
        scores[~bits(allowed, len(scores))] = -np.inf
    if np.isneginf(scores.max()):
        raise NothingLeftError("every token of the vocabulary is suppressed")
    return scores


def bits(mask: bytes, count: int) -> NDArray[np.bool_]:
    """The first `count` bits of a mask, the lowest first; those that it lacks are unset."""
    found = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little", count=count)
    return found.astype(np.bool_)


def _largest(values: Logits, count: int) -> Ids:
    """Indices of the `count` largest values, best first; the lower index first among equals.

    The count-th best of the maxima of disjoint groups is no better than the count-th best value:
    as a border it costs one pass and leaves few to sort.
    """
    grouped = len(values) // _GROUP * _GROUP
    maxima = values[:grouped].reshape(_GROUP, -1).max(axis=0)
    candidates = maxima if count < len(maxima) else values
    rank = max(len(candidates) - count, 0)
    index = np.flatnonzero(values >= np.partition(candidates, rank)[rank])
    return index[np.argsort(-values[index], kind="stable")][:count]


def _nucleus(weights: Weights, top_p: float) -> Ids:
    """The fewest indices, best first, that hold at least `top_p` of the mass.

    An index stays while the mass before it is below `top_p` of the whole. The tail below `border`
    holds at most `1 - top_p` of it, however many there are, so only what is above is sorted.
    """
    mass = np.exp(weights)
    whole = mass.sum()
    border = np.log((1 - top_p) * whole / len(weights))
    index = np.flatnonzero(weights >= border)
    order = index[np.argsort(-weights[index], kind="stable")]
    running = np.cumsum(mass[order])
    return order[: np.searchsorted(running, top_p * whole) + 1]
