"""What a caller asked for: sampling parameters and one request, validated once.

Token ids only; text has become ids before a `Request` is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Protocol

from halfbyte.errors import InvalidInputError


class Guide(Protocol):
    """What may come next, by rules that are not the model's: a grammar, a thought's budget.

    Stateful inside, a function outside: the same ids give the same answer, in any order of asking,
    so what is guided is as reproducible as what is not.
    """

    def allowed(self, chosen: Sequence[int]) -> bytes | None:
        """The ids that may follow those chosen so far, as bits, the lowest first; None: any."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a token is chosen from the target's logits.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 are off; the filters apply in
    this order after the temperature. `repetition_penalty` divides positive and multiplies negative
    logits of every token already in the sequence (1 is off). Of every token chosen so far,
    `presence_penalty` is taken off its logit, and `frequency_penalty` as often as it was chosen.
    `bias` is added to the logits of ids. `suppress` are ids never produced. The same `seed` gives
    the same tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    suppress: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        for token, value in self.bias:
            _within(f"the bias of {token}", value, -1000.0, 1000.0)
        _within("seed", self.seed, 0, 2**64 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt of ids to be continued until a stop id, `max_tokens`, or the end of the context.

    `max_tokens` None means: to the end of the context. `sequence` tells apart several completions
    of one prompt with one seed (0, 1, ...): it goes into the noise of sampling. `adapter` is the
    name of a loaded adapter, None for the model as it is. `top_logprobs`: how many of the likeliest
    tokens to tell beside each that is chosen; None: not even its own probability.
    `prompt_logprobs`: the same of every id of the prompt but the first, all of which is computed
    for that. `guide` rules out tokens. `client` is whom the request comes from: of several, none
    waits for all of another's.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop_ids: frozenset[int] = frozenset()
    sequence: int = 0
    adapter: str | None = None
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    guide: Guide | None = None
    client: str = ""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise InvalidInputError(
                "the prompt is empty", hint="give at least one token; --raw '' adds a BOS itself"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidInputError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        _within("sequence", self.sequence, 0, 2**64 - 1)
        _within("top_logprobs", self.top_logprobs or 0, 0, 1000)


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (low < value if open_low else low <= value) and value <= high
    if not isfinite(value) or not inside:
        bracket = "(" if open_low else "["
        raise InvalidInputError(f"{name} is {value}; it must be in {bracket}{low}, {high}]")
