"""Our statistics beside those of llama-perplexity's --kl-divergence, on the same logits.

Its definitions are computed here once more, token by token and from its own kind of file: the
base's log-probabilities in 16 bits between the largest and 16 nats below it, sums in f64 of f32
terms, tokens below -16 nats left out. The rounding is the floor of its numbers, not of ours.
"""

from __future__ import annotations

from math import exp, sqrt
from operator import attrgetter

import numpy as np
import pytest

from halfbyte.evals.fidelity import score_rows, summarize

Statistics = dict[str, float]


def sixteen_bits(row: np.ndarray) -> np.ndarray:
    """A row of logits as the log-probabilities [V] that are read back from a file of them."""
    top, bottom = row.max(), max(row.min(), row.max() - np.float32(16))
    log_sum = np.float32(np.log(np.exp(row - top).sum(dtype=np.float64)))
    scale = (top - bottom) / np.float32(65535)
    kept = np.where(row > bottom, np.rint((row - bottom) / scale), 0)
    return (scale * kept + (bottom - top - log_sum)).astype(np.float32)


def token_statistics(row: np.ndarray, base: np.ndarray, target: int) -> list[float]:
    """-log p of the right token, that of the base, the divergence, and whether the tops agree."""
    top = row.max()
    log_sum = np.float32(np.log(np.exp(row - top).sum(dtype=np.float64)))
    log_p, log_base = row - top - log_sum, sixteen_bits(base)
    counted = log_base > -16
    terms = np.exp(log_base[counted]) * (log_base[counted] - log_p[counted])
    same = float(row.argmax() == log_base.argmax())
    return [-log_p[target], -log_base[target], terms.sum(dtype=np.float64), same]


def as_llama_cpp(logits: np.ndarray, base: np.ndarray, targets: np.ndarray) -> Statistics:
    """The numbers it prints, by our names."""
    rows = zip(logits, base, targets, strict=True)
    loss, base_loss, kl, same = np.array([token_statistics(*row) for row in rows]).T
    change = np.exp(-loss) - np.exp(-base_loss)
    error = sqrt((np.var(loss) + np.var(base_loss) - 2 * np.cov(loss, base_loss, bias=True)[0, 1])
                 / (len(loss) - 1))  # fmt: skip
    ratio = exp(loss.mean() - base_loss.mean())
    return {
        "perplexity": exp(loss.mean()),
        "reference_perplexity": exp(base_loss.mean()),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * error,
        "same_top1": same.mean(),
        "kl.mean": kl.mean(),
        "kl.mean_error": sqrt(kl.var() / (len(kl) - 1)),
        "kl.max": kl.max(),
        "right_token.mean": change.mean(),
        "right_token.rms": sqrt(np.square(change).mean()),
        **{f"kl.{name}": percentile(kl, at) for name, at in KL_PERCENTILES.items()},
        **{f"right_token.{name}": percentile(change, at) for name, at in PERCENTILES.items()},
    }


KL_PERCENTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
PERCENTILES = {"p1": 0.01, "p5": 0.05, "p95": 0.95, "p99": 0.99}


def percentile(values: np.ndarray, fraction: float) -> float:
    """Between the two nearest of the sorted values, by their distance."""
    ordered = np.sort(values)
    place = fraction * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return (1 - place + low) * ordered[low] + (place - low) * ordered[high]


@pytest.mark.parametrize("noise", [0.3, 0.05])
def test_statistics_are_those_of_llama_cpp(noise: float) -> None:
    """A base as peaked as a language model's, a model that is near it, tokens drawn from it."""
    random = np.random.default_rng(7)
    base = (3 * random.normal(size=(800, 2000))).astype(np.float32)
    logits = (1.02 * base + noise * random.normal(size=base.shape)).astype(np.float32)
    targets = (base + random.gumbel(size=base.shape)).argmax(-1)
    found = summarize("t", score_rows(targets, logits, base))
    for name, expected in as_llama_cpp(logits, base, targets).items():
        assert attrgetter(name)(found) == pytest.approx(expected, rel=0.01), name
