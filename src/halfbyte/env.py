"""The only reader of the environment: each variable once, with its meaning and default.

Values are read when asked for, so a test or a caller may change them at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """HALFBYTE_CACHE: where converted models are kept (default ~/.cache/halfbyte)."""
    return Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")


def hub_home() -> Path:
    """HF_HOME: where the hub's files are kept (default ~/.cache/huggingface)."""
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")


def hub_endpoint() -> str:
    """HF_ENDPOINT: the hub's address (default https://huggingface.co)."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """HF_TOKEN: the access token for gated repositories (default: none)."""
    return os.environ.get("HF_TOKEN") or None


def hub_offline() -> bool:
    """HF_HUB_OFFLINE: 1 forbids every request (default 0)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def thread_count() -> int | None:
    """HALFBYTE_THREADS: compute threads (default: the processors this process may use)."""
    text = os.environ.get("HALFBYTE_THREADS", "")
    return int(text) if text.isdigit() and int(text) > 0 else None
