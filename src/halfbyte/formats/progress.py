"""How long work reports itself: bytes done of bytes in all, from the first call to the last."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
