"""The only reader of the environment: each variable once, with its meaning and default.

Values are read when asked for, so a test or a caller may change them at any time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """HALFBYTE_CACHE: where converted models are kept (default ~/.cache/halfbyte)."""
    return Path(os.environ.get("HALFBYTE_CACHE") or Path.home() / ".cache" / "halfbyte")


def hub_home() -> Path:
    """HF_HOME: the hub's folder (default huggingface in XDG_CACHE_HOME, that is ~/.cache)."""
    home = os.environ.get("HF_HOME")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(caches) / "huggingface").expanduser()


def hub_cache() -> Path:
    """HF_HUB_CACHE: where the hub's files are kept (default hub in HF_HOME)."""
    cache = os.environ.get("HF_HUB_CACHE")
    return Path(cache).expanduser() if cache else hub_home() / "hub"


def hub_endpoint() -> str:
    """HF_ENDPOINT: the hub's address (default https://huggingface.co)."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_token() -> str | None:
    """HF_TOKEN: the access token for gated repositories (default: none)."""
    return os.environ.get("HF_TOKEN", "").strip() or None


def hub_token_file() -> Path:
    """HF_TOKEN_PATH: where `hf auth login` leaves a token (default token in HF_HOME)."""
    path = os.environ.get("HF_TOKEN_PATH")
    return Path(path).expanduser() if path else hub_home() / "token"


def hub_offline() -> bool:
    """HF_HUB_OFFLINE: 1 forbids every request, to any hub (default 0)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}


def modelscope_endpoint() -> str:
    """MODELSCOPE_ENDPOINT: ModelScope's address (default https://modelscope.cn)."""
    return (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")


def modelscope_token() -> str | None:
    """MODELSCOPE_API_TOKEN: the access token for private repositories (default: none)."""
    return os.environ.get("MODELSCOPE_API_TOKEN", "").strip() or None


def secrets() -> Iterator[str]:
    """Every token that the variables above and the token file hold, for whoever must hide them."""
    file = hub_token_file()
    stored = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = (hub_token(), modelscope_token(), stored.strip())
    yield from (token for token in found if token)


def thread_count() -> int | None:
    """HALFBYTE_THREADS: compute threads (default: the processors this process may use)."""
    text = os.environ.get("HALFBYTE_THREADS", "")
    return int(text) if text.isdigit() and int(text) > 0 else None


def processor_count(root: Path = Path("/")) -> int:
    """The processors this process may use: its affinity, and its share of a container.

    A part of a processor counts only where it is all there is: the thread on it would keep the
    others waiting. `root` is where /proc and /sys are.
    """
    allowed = len(os.sched_getaffinity(0))
    return max(1, int(min([allowed, *map(_quota, control_groups("cpu", root))])))


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The folders that may limit something: this process's groups, and those around them."""
    table = root / "proc/self/cgroup"
    for line in table.read_text().splitlines() if table.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = top / path.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(top))


def _quota(group: Path) -> float:
    """Processors a control group may use; version 2 keeps them in one file, version 1 in two."""
    files = [group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    numbers = " ".join(file.read_text() for file in files if file.exists()).split()
    limited = len(numbers) == 2 and numbers[0].isdigit()
    return int(numbers[0]) / int(numbers[1]) if limited else math.inf


def library_path() -> tuple[Path, ...]:
    """LD_LIBRARY_PATH: where libraries are looked for first (default: nowhere)."""
    return tuple(Path(it) for it in os.environ.get("LD_LIBRARY_PATH", "").split(":") if it)


def api_keys() -> tuple[str, ...]:
    """HALFBYTE_API_KEY: keys of which a server wants one, with commas between (default: none)."""
    keys = os.environ.get("HALFBYTE_API_KEY", "").split(",")
    return tuple(key.strip() for key in keys if key.strip())


def no_color() -> bool:
    """NO_COLOR: any value but the empty one turns colours off (default: unset)."""
    return bool(os.environ.get("NO_COLOR"))
