"""How much of a task is done, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`limit`: the first so many items. `max_tokens` of an answer. `longest`: tokens of the longest
    haystack. `allow_code`: answers that are programs may be run."""

    limit: int | None = None
    max_tokens: int = 256
    longest: int = 4096
    allow_code: bool = False
