"""How a server is set up: whom it lets in, and how much of everything it takes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from halfbyte.errors import InvalidInputError

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Addresses, keys and bounds.

    `keys`: of these a request must show one; none: everybody may. `hosts`: names by which the
    server may be called, beside its own. `origins`: web pages of other origins that may call it.
    `waiting` requests may queue; of more `connections` than that, those without a request go.
    Sizes in bytes, times in seconds; `body_s` is how long a body may take beyond its size.
    """

    host: str = "127.0.0.1"
    port: int = 8470
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    strict_model: bool = False
    page: bool = True
    waiting: int = 64
    drain_s: float = 30.0
    ping_s: float = 15.0
    request_s: float = 3600.0
    body_s: float = 30.0
    body_bytes: int = MIB
    connections: int = 256

    @property
    def is_public(self) -> bool:
        """Whether others than this machine can reach it."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True


# Not settings: no client of the kinds served here needs more.
MAX_HEADER_BYTES = 2**16
MIN_BODY_RATE = 2**14  # bytes a second, after the first `body_s`
MAX_DEPTH = 64
MAX_MESSAGES = 2048
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 64


def require_a_key(settings: Settings, *, insecure: bool) -> None:
    """Raises `InvalidInputError` for an open server that anybody could reach."""
    if settings.is_public and not settings.keys and not insecure:
        raise InvalidInputError(
            f"a server on {settings.host} without a key would be open to everybody who reaches it",
            where="--host",
            hint="give --api-key-file FILE (or HALFBYTE_API_KEY), or --insecure-no-key",
        )
