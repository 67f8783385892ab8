"""Counters and gauges for Prometheus, in a registry of our own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from halfbyte.engine import Usage
from halfbyte.serve.stream import Told

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
NEXT_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


RECENT = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """How one answer went."""

    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_s: float
    tokens_per_second: float | None
    drafted: int
    accepted: int
    accepted_by_position: tuple[int, ...]
    rounds: int


class Metrics:
    """What a server counts. `memory` gives bytes by kind, asked for at every look."""

    def __init__(self, memory: Callable[[], dict[str, int]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._memory = memory
        self.requests = Counter(
            "halfbyte_requests", "Answered requests.", ("route", "status"), registry=registry
        )
        self._first = Histogram(
            "halfbyte_time_to_first_token_seconds", "", registry=registry, buckets=FIRST_S
        )
        self._next = Histogram(
            "halfbyte_inter_token_latency_seconds", "", registry=registry, buckets=NEXT_S
        )
        self._gauges = {
            name: Gauge(f"halfbyte_{name}", "", registry=registry)
            for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
        }
        self._memory_bytes = Gauge("halfbyte_memory_bytes", "", ("kind",), registry=registry)
        names = (
            "prompt_tokens",
            "generation_tokens",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "spec_decode_num_drafts",
            "spec_decode_draft_tokens",
            "spec_decode_accepted_tokens",
        )
        self._counts = {name: Counter(f"halfbyte_{name}", "", registry=registry) for name in names}
        self._by_position = Counter(
            "halfbyte_spec_decode_accepted_tokens_per_pos", "", ("position",), registry=registry
        )

        self.generated = 0
        self._recent: deque[Recent] = deque(maxlen=RECENT)

    def token(self) -> None:
        """A token has been told."""
        self.generated += 1

    def summary(self) -> dict[str, Any]:
        """The last answers, for the page."""
        return {"recent": [asdict(it) for it in self._recent]}

    def answered(self, told: Told, seconds: float) -> None:
        """One choice has ended, so long after it was asked for."""
        done = told.completion
        if done is None:
            return
        self._counts["prompt_tokens"].inc(done.prompt_tokens)
        self._counts["generation_tokens"].inc(len(done.token_ids))
        self._counts["prefix_cache_queries"].inc(done.prompt_tokens)
        self._counts["prefix_cache_hits"].inc(done.cached_tokens)
        self._recent.append(_recent(told))
        if told.first_s:
            self._first.observe(told.first_s)
        if told.tokens > 1:
            self._next.observe((seconds - told.first_s) / (told.tokens - 1))
        if done.draft is not None:
            self._counts["spec_decode_num_drafts"].inc(done.draft.rounds)
            self._counts["spec_decode_draft_tokens"].inc(done.draft.proposed)
            self._counts["spec_decode_accepted_tokens"].inc(done.draft.accepted)
            for position, accepted in enumerate(done.draft.accepted_by_position):
                self._by_position.labels(str(position)).inc(accepted)

    def text(self, usage: Usage) -> bytes:
        """Everything, as Prometheus reads it."""
        self._gauges["requests_running"].set(usage.running)
        self._gauges["requests_waiting"].set(usage.waiting)
        in_use = usage.pages_held - usage.pages_kept
        self._gauges["kv_cache_usage_ratio"].set(in_use / usage.pages)
        for kind, size in self._memory().items():
            self._memory_bytes.labels(kind).set(size)
        return generate_latest(self._registry)


def _recent(told: Told) -> Recent:
    done = told.completion
    assert done is not None
    draft = done.draft
    return Recent(
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        tokens=len(done.token_ids),
        first_s=told.first_s,
        tokens_per_second=done.decode_tokens / done.decode_s if done.decode_s else None,
        drafted=draft.proposed if draft else 0,
        accepted=draft.accepted if draft else 0,
        accepted_by_position=draft.accepted_by_position if draft else (),
        rounds=draft.rounds if draft else 0,
    )
