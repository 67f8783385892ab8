"""What a server serves: a model that loads while the door is open already, and then its desk."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from time import time
from typing import Any, Literal

from halfbyte.engine import Worker
from halfbyte.formats.progress import Progress
from halfbyte.llm import LLM
from halfbyte.planner.probe import resident_bytes
from halfbyte.serve.answering import Clerk
from halfbyte.serve.asking import Asker
from halfbyte.serve.desk import Desk
from halfbyte.serve.failure import Failure
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.settings import Settings

State = Literal["loading", "ready", "closing", "failed"]
Make = Callable[[Progress], LLM]
# A step that takes so long is none that will end.
STUCK_S = 300.0


class Service:
    """A model by its name, and everything that serves it. Made before there is a model.

    `parallel` sequences run at once.
    """

    def __init__(self, name: str, settings: Settings, *, parallel: int) -> None:
        self.name = name
        self.settings = settings
        self.parallel = parallel
        self.state: State = "loading"
        self.loaded = 0.0
        self.created = int(time())
        self.error: Exception | None = None
        self.metrics = Metrics(self.memory)
        self._llm: LLM | None = None
        self._desk: Desk | None = None
        self._clerk: Clerk | None = None
        self._asker: Asker | None = None

    def load(self, make: Make, done: Callable[[], None] = lambda: None) -> None:
        """Begins to load, in a thread; `done` is called in the loop. Call it from the loop."""
        loop = asyncio.get_running_loop()

        def work() -> None:
            try:
                llm = make(self._progress)
                llm.turns.stop_ids  # noqa: B018  renders a probe
                loop.call_soon_threadsafe(self.open, llm)
            except Exception as error:
                self.error, self.state = error, "failed"
            loop.call_soon_threadsafe(done)

        threading.Thread(target=work, name="loading", daemon=True).start()

    def open(self, llm: LLM) -> None:
        """Serves this model from now on."""
        self._llm = llm
        self._desk = Desk(
            Worker(llm.engine),
            parallel=self.parallel,
            waiting=self.settings.waiting,
            request_s=self.settings.request_s,
        )
        self._clerk = Clerk(self.metrics)
        self._asker = Asker(llm, self.name, strict=self.settings.strict_model)
        self.state = "ready"

    def _progress(self, done: int, total: int) -> None:
        self.loaded = done / total if total else 0.0

    @property
    def llm(self) -> LLM:
        return self._ready(self._llm)

    @property
    def desk(self) -> Desk:
        return self._ready(self._desk)

    @property
    def clerk(self) -> Clerk:
        return self._ready(self._clerk)

    @property
    def asker(self) -> Asker:
        return self._ready(self._asker)

    def _ready(self, part: Any) -> Any:
        if part is None:
            raise Failure(
                503,
                f"the model is loading: {self.loaded:.0%}",
                "model_loading",
                headers={"retry-after": "2"},
            )
        return part

    def healthy(self) -> None:
        """Raises `Failure` while loading, and when the engine does not get on."""
        if self.desk.worker.stuck_s > STUCK_S:
            raise Failure(503, "the engine does not get on", "engine_stuck")

    def memory(self) -> dict[str, int]:
        """Bytes by kind, as measured: what is ours, and what this process has in all."""
        if self._llm is None:
            return {"resident": resident_bytes()}
        memory = self._llm.memory
        return {
            "weights": memory.weights_bytes,
            "adapters": memory.adapters_bytes,
            "drafter": memory.drafter_bytes,
            "kv": memory.kv_bytes,
            "libraries": self._llm.before_bytes,
            "resident": resident_bytes(),
        }

    async def drain(self) -> bool:
        """Lets those who are in finish; whether all did in time."""
        self.state = "closing"
        return self._desk is None or await self._desk.drained(self.settings.drain_s)

    def close(self) -> None:
        """Ends everything, at once."""
        self.state = "closing"
        if self._desk is not None:
            self._desk.closing = True
            self._desk.worker.close(timeout_s=10.0)
