"""One HTTP request as the engine's: what the route asked for, whatever the wire format was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halfbyte.serve.stream import Telling
from halfbyte.specs import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request and a telling for every choice.

    `usage`: the client wants counts in a stream; `details`: it wants to know what was drafted.
    `model`: what the answer calls it. `echo`: the prompts, if they are to be told again.
    """

    requests: tuple[Request, ...]
    tell: Callable[[], list[Telling]]
    model: str
    streams: bool = False
    usage: bool = False
    continuous_usage: bool = False
    details: bool = False
    logprobs: bool = False
    echo: tuple[str, ...] = ()

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; several answers to one prompt count it once."""
        return sum(len(it.prompt_ids) for it in self.requests if it.sequence == 0)
