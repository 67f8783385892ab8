"""The engine: continuous batching, paged cache, reproducible sampling, speculation.

Token ids go in and come out; there is no text and no tensor in this room.
"""

from halfbyte.engine.drafters import LookupDrafter, ModelDrafter
from halfbyte.engine.drafting import Drafting
from halfbyte.engine.engine import Engine, Usage
from halfbyte.engine.logprobs import Logprobs
from halfbyte.engine.sampling import sample
from halfbyte.engine.sequence import Completion, Event, FinishReason
from halfbyte.engine.speculate import DraftStats, SyntheticVerdict, verify
from halfbyte.engine.worker import Worker

__all__ = [
    "Completion",
    "DraftStats",
    "Drafting",
    "Engine",
    "Event",
    "FinishReason",
    "Logprobs",
    "LookupDrafter",
    "ModelDrafter",
    "SyntheticVerdict",
    "Usage",
    "Worker",
    "sample",
    "verify",
]
