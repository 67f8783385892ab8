"""Models by name: from the Hugging Face hub into its own cache, checked byte for byte.

`org/name` is a directory of safetensors, or the one GGUF of a repository; `org/name:Q4_0` picks a
GGUF. Only data is fetched (weights, JSON, templates, vocabularies), never pickles or code. Every
file fetched is hashed against what the hub said of it: SHA-256 for large files, git's SHA-1 for the
others. With HF_HUB_OFFLINE=1 the cache alone answers.

The transfer itself (resuming, xet, redirects) is huggingface_hub's; its cache layout is kept, so
files are shared with other programs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from halfbyte import env
from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, NetworkError
from halfbyte.formats.atomic import atomic_file, require_space
from halfbyte.formats.progress import Progress

PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
REFERENCE = re.compile(rf"(?P<repo>{PART}/{PART})(?::(?P<tag>{PART}))?")
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +=()-]{0,200}")
SUFFIXES = {".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model"}
CHUNK = 1 << 22
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file as the hub lists it. `digest` is SHA-256 (large files) or git's SHA-1."""

    name: str
    size: int
    digest: str
    kind: Literal["sha256", "git-sha1"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The usable files at the top of a repository, at one commit."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]


def pull(reference: str, progress: Progress | None = None) -> Path:
    """Fetch what is not cached yet; the directory of the checkpoint, or the path of the GGUF.

    Raises `NetworkError` with a hint for each way a hub can refuse, `IntegrityError` for a file
    whose hash is not the hub's (it is removed), `DoesNotFitError` when the disk is too small.
    """
    repo, tag = _parse(reference)
    if env.hub_offline():
        return _cached(repo, tag)
    listing = _list(repo)
    chosen = _chosen(listing, tag)
    directory = _repo_cache(repo) / "snapshots" / listing.commit
    absent = [file for file in chosen if not (directory / file.name).is_file()]
    _require_space(sum(file.size for file in absent))
    done = sum(file.size for file in chosen) - sum(file.size for file in absent)
    total = sum(file.size for file in chosen)
    for file in absent:
        _fetch(listing, file)
        _check(directory / file.name, file, remove=True)
        done += file.size
        if progress is not None:
            progress(done, total)
    _remember(listing)
    return _result(directory, [file.name for file in chosen])


def verify_hub(reference: str, progress: Progress | None = None) -> int:
    """Hash the cached files of a reference against the hub; returns how many were right.

    Raises `IntegrityError` for a missing or altered file, and what `pull` raises.
    """
    repo, tag = _parse(reference)
    listing = _list(repo)
    chosen = _chosen(listing, tag)
    done, total = 0, sum(file.size for file in chosen)
    for file in chosen:
        _check(_repo_cache(repo) / "snapshots" / listing.commit / file.name, file, remove=False)
        done += file.size
        if progress is not None:
            progress(done, total)
    return len(chosen)


def _parse(reference: str) -> tuple[str, str | None]:
    match = REFERENCE.fullmatch(reference)
    if match is None or ".." in reference or "--" in reference:
        raise InvalidInputError(
            f"'{reference[:200]}' is no existing path and no name on the hub",
            hint="give a directory, a .gguf file, org/name, or org/name:Q4_0",
        )
    return match["repo"], match["tag"]


def _list(repo: str) -> Listing:
    """Ask the hub what `main` holds."""
    from huggingface_hub import HfApi

    with _translated(repo):
        api = HfApi(endpoint=env.hub_endpoint(), token=env.hub_token())
        info = api.model_info(repo, revision="main", files_metadata=True, timeout=TIMEOUT_S)
    if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise IntegrityError("the hub names no commit", where=repo)
    files: list[RemoteFile] = []
    for item in info.siblings or []:
        if not _is_wanted(item.rfilename) or item.size is None:
            continue
        digest = item.lfs.sha256 if item.lfs is not None else str(item.blob_id)
        files.append(
            RemoteFile(
                name=item.rfilename,
                size=item.size,
                digest=digest,
                kind="sha256" if item.lfs is not None else "git-sha1",
            )
        )
    return Listing(repo=repo, commit=info.sha, files=tuple(files))


def _is_wanted(name: str) -> bool:
    """Data of a known kind at the top of the repository, under a plain name."""
    return PurePosixPath(name).suffix in SUFFIXES and SAFE_NAME.fullmatch(name) is not None


def _chosen(listing: Listing, tag: str | None) -> list[RemoteFile]:
    """One GGUF, or a checkpoint of safetensors with everything that describes it."""
    names = [file.name for file in listing.files]
    picked = set(_pick(names, tag, listing.repo))
    return [file for file in listing.files if file.name in picked]


def _pick(names: list[str], tag: str | None, repo: str) -> list[str]:
    weights = [name for name in names if name.endswith(".safetensors")]
    standard = [name for name in weights if name.startswith("model")]
    if tag is None and weights:
        other = [name for name in names if not name.endswith((".safetensors", ".gguf"))]
        return (standard or weights) + other
    models = [
        name for name in names if name.endswith(".gguf") and not name.lower().startswith("mmproj")
    ]
    if tag is not None:
        word = re.compile(rf"(?<![a-z0-9]){re.escape(tag.lower())}(?![a-z0-9_])")
        found = [name for name in models if word.search(name.lower())]
    else:
        found = models
    if len(found) != 1:
        shown = ", ".join(models[:20]) or "none"
        raise InvalidInputError(
            f"{len(found)} GGUF files match", where=repo, hint=f"pick one as {repo}:TAG of: {shown}"
        )
    return found


def _fetch(listing: Listing, file: RemoteFile) -> None:
    from huggingface_hub import hf_hub_download

    with _translated(listing.repo):
        hf_hub_download(
            listing.repo,
            file.name,
            revision=listing.commit,
            cache_dir=_hub_cache(),
            endpoint=env.hub_endpoint(),
            token=env.hub_token(),
            etag_timeout=TIMEOUT_S,
        )


def _check(path: Path, file: RemoteFile, *, remove: bool) -> None:
    """The hub's hash against ours; a wrong file is removed from the cache if asked."""
    if not path.is_file():
        raise IntegrityError("is not in the cache", where=path, hint="pull it first")
    found = _digest(path, file.kind)
    if found == file.digest:
        return
    if remove:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise IntegrityError(
        f"{file.kind}: the hub says {file.digest}, found {found}",
        where=path,
        hint="pull it again; if it stays wrong, do not use it",
    )


def _digest(path: Path, kind: Literal["sha256", "git-sha1"]) -> str:
    digest = hashlib.sha256()
    if kind == "git-sha1":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _remember(listing: Listing) -> None:
    """Note in the cache that `main` is this commit, for those who ask offline."""
    reference = _repo_cache(listing.repo) / "refs" / "main"
    reference.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(reference, size=len(listing.commit)) as file:
        file.write(listing.commit.encode())


def _cached(repo: str, tag: str | None) -> Path:
    """What the cache holds of `main`."""
    reference = _repo_cache(repo) / "refs" / "main"
    if reference.is_file():
        directory = _repo_cache(repo) / "snapshots" / reference.read_text().strip()
        names = sorted(file.name for file in directory.glob("*") if _is_wanted(file.name))
        if names:
            return _result(directory, _pick(names, tag, repo))
    raise NetworkError(
        "not in the cache, and HF_HUB_OFFLINE forbids asking the hub",
        where=repo,
        hint="unset HF_HUB_OFFLINE and pull it once",
    )


def _result(directory: Path, names: list[str]) -> Path:
    return directory / names[0] if names[0].endswith(".gguf") else directory


def _hub_cache() -> Path:
    return env.hub_home() / "hub"


def _repo_cache(repo: str) -> Path:
    return _hub_cache() / f"models--{repo.replace('/', '--')}"


def _require_space(size: int) -> None:
    cache = _hub_cache()
    cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, size)


@contextmanager
def _translated(repo: str) -> Generator[None]:
    """Whatever the hub's library raises becomes ours.

    It has changed its HTTP library twice and lets that library's errors through, so there is no
    narrower class to name here.
    """
    try:
        yield
    except Exception as error:
        raise _network_error(error, repo) from error


def _network_error(error: Exception, repo: str) -> HalfbyteError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    for cause in (error.__cause__, error.__context__):
        status = status or getattr(getattr(cause, "response", None), "status_code", None)
    if status in REFUSALS:
        what, hint = REFUSALS[status]
        return NetworkError(f"{what} ({status})", where=repo, hint=hint)
    if status is not None:
        return NetworkError(f"the hub answered {status}", where=repo, hint="try again later")
    first = str(error).strip().split("\n", 1)[0][:200]
    return NetworkError(
        f"{env.hub_endpoint()} cannot be reached: {type(error).__name__}: {first}",
        where=repo,
        hint="check the connection and HF_ENDPOINT; HF_HUB_OFFLINE=1 uses what is cached",
    )


REFUSALS = {
    401: (
        "no such model, or it is private or gated and there is no valid token",
        "check the name; for a gated model set HF_TOKEN to a token with read access",
    ),
    403: (
        "the token has no access to this model",
        "accept the model's licence on its page, with the account of HF_TOKEN",
    ),
    404: ("no such model or revision on the hub", "check the name: org/name"),
    429: ("the hub limits how often you ask", "wait some minutes, or set HF_TOKEN"),
}
