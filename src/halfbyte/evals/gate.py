"""A gate: thresholds on measured fidelity, read from a TOML file, and what misses them.

    max_kl_mean = 0.02
    min_same_top1 = 0.92
    max_perplexity_increase = 0.03   # a fraction: 3 %

Every threshold holds for every text. A number that is not a number misses. Nothing is raised for a
miss: what to do about one is decided upstairs.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import InvalidInputError
from halfbyte.evals.fidelity import Fidelity

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
