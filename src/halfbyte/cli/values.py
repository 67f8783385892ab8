"""Values as people write them: lengths ("8k" is 8192) and temperatures of files and flags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import click

from halfbyte.specs import Draft


def length(value: str) -> int:
    """A number of tokens: 4096, 8k (8192), 1m (1048576)."""
    match = re.fullmatch(r"(\d+)([kKmM]?)", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"'{value}' is no length; write 4096 or 8k")
    return int(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]


def draft(value: str) -> Draft:
    """How many tokens to draft: auto, off, or a number from 1 on."""
    if value in ("auto", "off"):
        return value
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"'{value}' is no number of drafts; write auto, off or 4")


def shares(value: str) -> list[float]:
    """Several numbers: 0.8,0.64."""
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"'{value}' is no list of numbers; write 0.8,0.64") from None


def sequences(value: str) -> int | None:
    """A number of sequences, or None for max: as many as fit."""
    if value == "max":
        return None
    if value.isdigit() and int(value) > 0:
        return int(value)
    raise click.BadParameter(f"'{value}' is no number of sequences; write 4 or max")


def size(value: str) -> int:
    """A number of bytes: 12GiB (2^30), 6.7GB (10^9), 512MiB, 8G (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(i?[bB])?", value.strip())
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"'{value}' is no size; write 12GiB or 6.7GB")
    decimal = match[3] is not None and len(match[3]) == 1 and match[2]
    base = 1000 if decimal else 1024
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def gib(size: int) -> str:
    """Bytes for a person: 5.2 MiB, 6.71 GiB."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def named_files(values: Iterable[str]) -> dict[str, Path]:
    """Files by name: NAME=FILE, or FILE, which is then its own name."""
    found: dict[str, Path] = {}
    for value in values:
        name, _, path = value.rpartition("=") if not Path(value).exists() else ("", "", value)
        if not Path(path).is_file():
            raise click.BadParameter(f"there is no file '{path}'")
        name = name or Path(path).name
        if name in found:
            raise click.BadParameter(f"two files are named '{name}'; write NAME=FILE")
        found[name] = Path(path)
    return found
