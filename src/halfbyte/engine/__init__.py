"""The engine: continuous batching, paged cache, reproducible sampling. Token ids in and out."""

from halfbyte.engine.engine import PAGE_LEN, Engine
from halfbyte.engine.sampling import sample
from halfbyte.engine.sequence import Completion, Event, FinishReason

__all__ = ["PAGE_LEN", "Completion", "Engine", "Event", "FinishReason", "sample"]
