"""Common cards by name, with what their makers list: memory and bandwidth.

For planning a machine that is not here. Figures are the makers' (bandwidth in units of 10^9 bytes
a second); a card sold with two sizes is named with its size. What a card reaches is less: plans
for one that is here use what was measured.
"""

from __future__ import annotations

import re

from halfbyte.errors import InvalidInputError
from halfbyte.specs import Machine

GIB = 2**30

# name: (GiB, 10^9 bytes/s)
CARDS: dict[str, tuple[int, float]] = {
    "gtx-1060": (6, 192),
    "gtx-1070": (8, 256),
    "gtx-1080": (8, 320),
    "gtx-1080-ti": (11, 484),
    "gtx-1650": (4, 128),
    "gtx-1660-ti": (6, 288),
    "rtx-2060": (6, 336),
    "rtx-2060-12gb": (12, 336),
    "rtx-2070": (8, 448),
    "rtx-2080": (8, 448),
    "rtx-2080-ti": (11, 616),
    "rtx-3050": (8, 224),
    "rtx-3060": (12, 360),
    "rtx-3060-ti": (8, 448),
    "rtx-3070": (8, 448),
    "rtx-3070-ti": (8, 608),
    "rtx-3080": (10, 760),
    "rtx-3080-12gb": (12, 912),
    "rtx-3080-ti": (12, 912),
    "rtx-3090": (24, 936),
    "rtx-4060": (8, 272),
    "rtx-4060-ti": (8, 288),
    "rtx-4060-ti-16gb": (16, 288),
    "rtx-4070": (12, 504),
    "rtx-4070-super": (12, 504),
    "rtx-4070-ti": (12, 504),
    "rtx-4070-ti-super": (16, 672),
    "rtx-4080": (16, 717),
    "rtx-4080-super": (16, 736),
    "rtx-4090": (24, 1008),
    "rtx-5060": (8, 448),
    "rtx-5060-ti": (8, 448),
    "rtx-5060-ti-16gb": (16, 448),
    "rtx-5070": (12, 672),
    "rtx-5070-ti": (16, 896),
    "rtx-5080": (16, 960),
    "rtx-5090": (32, 1792),
    "rtx-a2000-12gb": (12, 288),
    "rtx-a4000": (16, 448),
    "rtx-a6000": (48, 768),
    "t4": (16, 320),
    "l4": (24, 300),
    "a10": (24, 600),
    "a100-40gb": (40, 1555),
    "a100-80gb": (80, 2039),
    "h100": (80, 3350),
    "h200": (141, 4800),
}


def card(name: str) -> Machine:
    """The card of that name ("rtx-3060", "RTX 3060", "4070 Ti Super"). `InvalidInputError`."""
    wanted = _plain(name)
    for known, (size, bandwidth) in CARDS.items():
        if wanted and wanted in (_plain(known), _plain(known.partition("-")[2])):
            return Machine(
                name=known, kind="cuda", memory_bytes=size * GIB, bandwidth=bandwidth * 1e9
            )
    near = [known for known in CARDS if wanted and wanted in _plain(known)]
    hint = f"near: {', '.join(near)}" if near else f"known: {', '.join(CARDS)}"
    raise InvalidInputError(f"no card '{name}' is listed", hint=hint)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
