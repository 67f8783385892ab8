"""A model's name on a hub, and which of a repository's files it means.

`org/name` is a checkpoint of safetensors, or the one GGUF of a repository; `org/name:Q4_0` picks a
GGUF by a word of its path; `org/name@revision` takes another branch, tag or commit. A split GGUF
counts as one and is taken whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.errors import IntegrityError, InvalidInputError

PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
NAME = re.compile(rf"(?P<repo>{PART}/{PART})(?:@(?P<revision>{PART}))?(?::(?P<tag>{PART}))?")
SPLIT = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
BESIDE = ("mmproj", "imatrix")  # GGUF files that are no models


@dataclass(frozen=True, slots=True, kw_only=True)
class HubName:
    """A parsed name. `revision` None is the hub's default branch."""

    repo: str
    revision: str | None
    tag: str | None


def parse_name(text: str) -> HubName:
    """Raises `InvalidInputError` for what is no name."""
    match = NAME.fullmatch(text)
    if match is None or ".." in text or "--" in text:
        raise InvalidInputError(
            f"'{text[:200]}' is no existing path and no name on the hub",
            hint="give a directory, a .gguf file, org/name, or org/name:Q4_0",
        )
    return HubName(repo=match["repo"], revision=match["revision"], tag=match["tag"])


def pick(names: list[str], tag: str | None, repo: str) -> list[str]:
    """One GGUF (all its parts, in order), or a checkpoint and everything that describes it.

    Raises `InvalidInputError` when not exactly one GGUF matches.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    if tag is None and weights:
        standard = [name for name in weights if name.startswith("model")]
        other = [name for name in names if not name.endswith((".safetensors", ".gguf"))]
        return (standard or weights) + other
    models = _models(names)
    found = [stem for stem in models if tag is None or _has_word(stem, tag)]
    if len(found) != 1:
        raise _choice(found, list(models), repo)
    return _whole(models[found[0]], repo)


def _models(names: Iterable[str]) -> dict[str, list[str]]:
    """The GGUF models by stem: one file each, or the parts of a split one."""
    models: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.endswith(".gguf") and not name.rpartition("/")[2].lower().startswith(BESIDE):
            split = SPLIT.fullmatch(name)
            models.setdefault(split["stem"] if split else name, []).append(name)
    return models


def _has_word(stem: str, tag: str) -> bool:
    word = rf"(?<![a-z0-9]){re.escape(tag.lower())}(?![a-z0-9_])"
    return re.search(word, stem.lower()) is not None


def _choice(found: list[str], models: list[str], repo: str) -> InvalidInputError:
    shown = ", ".join(models[:20]) or "none"
    return InvalidInputError(
        f"{len(found)} GGUF models match", where=repo, hint=f"pick one as {repo}:TAG of: {shown}"
    )


def _whole(parts: list[str], repo: str) -> list[str]:
    """The parts of one model; a split one must be complete."""
    split = SPLIT.fullmatch(parts[0])
    if split is None:
        return parts
    count = split["parts"]
    expected = [f"{split['stem']}-{part:05}-of-{count}.gguf" for part in range(1, int(count) + 1)]
    if parts != expected:
        raise IntegrityError(
            f"{len(parts)} of the {int(count)} parts of {split['stem']} are there", where=repo
        )
    return parts
