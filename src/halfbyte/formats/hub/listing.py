"""What a hub says it holds: the usable files of a repository at one commit, each with its hash.

Only data of known kinds is listed (weights, JSON, templates, vocabularies), under plain names;
pickles, code and names that could leave the cache are passed over. What is listed and malformed is
an error: without a size and a hash nothing could be checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, cast

from halfbyte.errors import IntegrityError, UnsupportedError

Kind = Literal["sha256", "git-sha1"]
HEX_DIGITS: dict[Kind, int] = {"sha256": 64, "git-sha1": 40}
SUFFIXES = {".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model"}
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +=()-]{0,200}")
DEEPEST = 3
MOST_FILES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as a hub lists it. `digest` is hexadecimal: SHA-256, or git's SHA-1 of a blob."""

    name: str
    size: int
    digest: str
    kind: Kind
    url: str

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[0-9a-f]{{{HEX_DIGITS[self.kind]}}}", self.digest) or self.size < 0:
            raise IntegrityError(
                "the hub gives no usable size and hash", where=self.name, hint="nothing was fetched"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The usable files of a repository at one commit (40 hexadecimal digits)."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}", self.commit):
            raise IntegrityError("the hub names no commit", where=self.repo)


def wanted(
    items: object, repo: str, name_of: Callable[[dict[str, Any]], object]
) -> list[tuple[str, dict[str, Any]]]:
    """The entries of a hub's list of files that a model may need, with their names."""
    if not isinstance(items, list):
        raise IntegrityError("the hub lists no files", where=repo)
    entries = [item for item in cast("Iterable[Any]", items) if isinstance(item, dict)]
    named = [(str(name_of(item)), item) for item in entries]
    kept = [(name, item) for name, item in named if is_wanted(name)]
    if len(kept) > MOST_FILES:
        raise UnsupportedError(f"{len(kept)} files; at most {MOST_FILES} are read", where=repo)
    return kept


def is_wanted(name: str) -> bool:
    """Data of a known kind under a plain name: at the top, or a GGUF in a folder of its own."""
    path = PurePosixPath(name)
    plain = all(PLAIN.fullmatch(part) for part in name.split("/"))
    deepest = DEEPEST if path.suffix == ".gguf" else 1
    return plain and path.suffix in SUFFIXES and len(path.parts) <= deepest
