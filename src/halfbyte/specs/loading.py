"""How a caller wants a model loaded, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Method = Literal["rtn", "search"]
SolveMethod = Literal["rtn", "search", "gptq", "yaqa", "awq", "signround"]
DType = Literal["auto", "f32", "bf16"]
KVType = Literal["f32", "bf16", "q8_0"]
Draft = Literal["off", "auto"] | int
AUTO = "auto"


def most_drafts(draft: Draft) -> int | None:
    """What drafting of this kind asks of a plan; None leaves it to the plan."""
    return {"off": 0, "auto": None}[draft] if isinstance(draft, str) else draft


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """How a model is loaded.

    `recipe` quantizes an unquantized checkpoint on the way, by `method`. `device` is "auto", "cpu",
    "cuda" or "cuda:INDEX"; `dtype` what activations are rounded to; `kv` how keys and values are
    kept. `context` is the positions of one sequence, None for the model's own up to a default.
    `draft` is how many tokens are drafted in a round, "auto" as many as pay; `drafter` is a model
    that drafts, "auto" the one that lies beside the target, if any. `parallel` sequences run at
    once; `spare` rings more make room for what is kept of those that ended. `card_layers` of the
    last layers run on the card, the others on the CPU; None: all, or as many as the card takes.
    """

    recipe: str | None = None
    method: Method = "search"
    device: str = "auto"
    dtype: DType = "auto"
    kv: KVType = "bf16"
    context: int | None = None
    threads: int | None = None
    draft: Draft = AUTO
    drafter: str = AUTO
    parallel: int = 1
    spare: int = 0
    card_layers: int | None = None
