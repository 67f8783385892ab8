"""The published config.json files of bench/configs, and how many parameters each model has.

They lack the fields that say nothing of the text model's shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[1] / "bench" / "configs"

BILLIONS = {
    "llama-3.2-1b": 1.236,
    "mistral-7b": 7.242,
    "qwen2-0.5b": 0.494,
    "qwen3-0.6b": 0.596,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "gemma3-270m": 0.268,
    "gemma3-1b": 1.0,
    "gemma3-4b": 3.88,
    "gemma3-12b": 11.766,
    "gemma3-27b": 27.009,
    "gemma4-e2b": 4.629,
    "gemma4-e4b": 7.463,
    "gemma4-12b": 11.907,
    "gemma4-26b-a4b": 25.233,
    "gemma4-31b": 30.697,
}

# name -> (config.json, billions of parameters of the text model)
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    name: (json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")), billions)
    for name, billions in BILLIONS.items()
}


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The part that describes the text model."""
    return config.get("text_config", config)
