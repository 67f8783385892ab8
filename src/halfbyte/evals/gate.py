"""A gate: thresholds on measured fidelity, from a TOML file or our own, and what misses them.

    max_kl_mean = 0.02
    min_same_top1 = 0.92
    max_perplexity_increase = 0.03   # a fraction: 3 %

Our own (`default_gate`) follow from how most weights are stored, since what is a disaster in f32 is
the rounding of q4_0. Every threshold holds for every text. A number that is not a number misses.
Nothing is raised for a miss: what to do about one is decided upstairs.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import Fidelity
from halfbyte.specs import ModelSpec, Scheme

THRESHOLDS = (
    "max_perplexity",
    "max_perplexity_increase",
    "max_kl_mean",
    "max_kl_median",
    "max_kl_p90",
    "max_kl_p99",
    "max_kl_p999",
    "max_kl_max",
    "min_same_top1",
)

# Least bits per weight, then max_kl_mean, min_same_top1, max_perplexity_increase. Those of 16, 8
# and 4 bits are two to three times what a sound small model measures with rounded activations and
# keys; the others follow the square of the rounding error between them.
DEFAULTS = (
    (16.0, 0.001, 0.97, 0.005),
    (8.0, 0.0015, 0.95, 0.01),
    (6.5, 0.006, 0.90, 0.02),
    (5.0, 0.02, 0.85, 0.04),
    (4.0, 0.09, 0.72, 0.10),
    (0.0, 0.4, 0.5, 0.5),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """`number` of `text` was `measured`, beyond its threshold."""

    text: str
    number: str
    measured: float
    threshold: float


def read_gate(path: Path) -> dict[str, float]:
    """The thresholds of a gate file, by name."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidInputError(f"not a gate file: {error}", where=path) from error
    for name, value in document.items():
        if name not in THRESHOLDS or isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidInputError(
                f"'{name} = {value}' is no threshold",
                where=path,
                hint=f"a number for one of {', '.join(THRESHOLDS)}",
            )
    if not document:
        raise InvalidInputError("has no thresholds, so nothing could miss it", where=path)
    return {name: float(value) for name, value in document.items()}


def default_gate(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> dict[str, float]:
    """Thresholds for a model stored like this: those of the scheme that most weights have."""
    weights: Counter[Scheme] = Counter()
    for tensor in spec.tensors():
        weights[schemes[tensor.name]] += tensor.count
    bits = weights.most_common(1)[0][0].bits
    _, kl, top1, rise = next(row for row in DEFAULTS if bits >= row[0])
    return {"max_kl_mean": kl, "min_same_top1": top1, "max_perplexity_increase": rise}


def misses(gate: Mapping[str, float], texts: Iterable[Fidelity]) -> list[Miss]:
    """What misses the gate, in the order of the texts and of the thresholds.

    Raises `InvalidInputError` for a threshold on what only a reference can tell, without one.
    """
    found: list[Miss] = []
    for text in texts:
        numbers = _numbers(text)
        for name, threshold in gate.items():
            number = name[4:]
            if number not in numbers:
                raise InvalidInputError(
                    f"the gate asks for {name}, which needs a reference", hint="use --against"
                )
            measured = numbers[number]
            kept = measured <= threshold if name.startswith("max_") else measured >= threshold
            if not kept:
                found.append(
                    Miss(text=text.name, number=number, measured=measured, threshold=threshold)
                )
    return found


def _numbers(text: Fidelity) -> dict[str, float]:
    numbers = {"perplexity": text.perplexity}
    if text.reference_perplexity is not None:
        numbers["perplexity_increase"] = text.perplexity / text.reference_perplexity - 1
    if text.kl is not None:
        numbers |= {f"kl_{name}": value for name, value in asdict(text.kl).items()}
    if text.same_top1 is not None:
        numbers["same_top1"] = text.same_top1
    return numbers
