"""halfbyte: a language model in half a byte per weight, proved to behave like the original."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from halfbyte.llm import LLM
    from halfbyte.planner.monitor import Monitor
    from halfbyte.specs import LoadOptions

__all__ = ["LLM", "LoadOptions", "Monitor", "__version__"]


def __getattr__(name: str) -> Any:
    """Resolves the public names when they are first used: importing halfbyte stays instant."""
    if name == "LLM":
        from halfbyte.llm import LLM

        return LLM
    if name == "Monitor":
        from halfbyte.planner.monitor import Monitor

        return Monitor
    if name == "LoadOptions":
        from halfbyte.specs import LoadOptions

        return LoadOptions
    raise AttributeError(f"module 'halfbyte' has no attribute '{name}'")
