"""What a caller asked for: sampling parameters and one request, validated once.

Token ids only; text has become ids before a `Request` is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from halfbyte.errors import InvalidInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen from the target's logits.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off; the filters apply in
    this order after the temperature. `repetition_penalty` divides positive and multiplies negative
    logits of every token already in the sequence (1 is off). `suppress` are ids never produced.
    The same `seed` gives the same tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    suppress: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("seed", self.seed, 0, 2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt of ids to be continued until a stop id, `max_tokens`, or the end of the context.

    `max_tokens` None means: to the end of the context. `sequence` tells apart several completions
    of one prompt with one seed (0, 1, ...): it goes into the noise of sampling. `adapter` is the
    name of a loaded adapter, None for the model as it is.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    sequence: int = 0
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidInputError(
                "the prompt is empty", hint="give at least one token; --raw '' adds a BOS itself"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        _within("sequence", self.sequence, 0, 2**64 - 1)


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not isfinite(value) or not inside:
        bracket = "(" if open_low else "["
        raise InvalidInputError(f"{name} is {value}; it must be in {bracket}{low}, {high}]")
