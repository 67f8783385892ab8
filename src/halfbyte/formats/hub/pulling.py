"""From a name to files on this disk: ask, choose, make sure they fit, fetch, check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from halfbyte import env
from halfbyte.errors import InvalidInputError, NetworkError
from halfbyte.formats.atomic import require_space, write_errors
from halfbyte.formats.hub import huggingface, modelscope
from halfbyte.formats.hub.cache import RepoCache, check
from halfbyte.formats.hub.client import Client, Patience, Site
from halfbyte.formats.hub.headers import WHOLE, outline, outline_folder
from halfbyte.formats.hub.listing import Listing, RemoteFile
from halfbyte.formats.hub.names import HubName, parse_name, pick
from halfbyte.formats.progress import Progress

HubId = Literal["huggingface", "modelscope"]
PATIENCE = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A kind of hub: its default branch, and where its files go."""

    branch: str
    site: Callable[[], Site]
    cache: Callable[[], Path]
    listing: Callable[[Client, str, str], Listing]


HUBS: dict[HubId, Hub] = {
    "huggingface": Hub(
        branch=huggingface.BRANCH,
        site=huggingface.site,
        cache=huggingface.cache,
        listing=huggingface.listing,
    ),
    "modelscope": Hub(
        branch=modelscope.BRANCH,
        site=modelscope.site,
        cache=modelscope.cache,
        listing=modelscope.listing,
    ),
}


def pull(
    name: str,
    progress: Progress | None = None,
    *,
    hub: HubId = "huggingface",
    patience: Patience = PATIENCE,
) -> Path:
    """Fetch what is not cached yet; the directory of the checkpoint, or the path of the GGUF.

    Of a split GGUF it is the path of the first part. `progress` counts bytes. Raises `NetworkError`
    with a hint for each way a hub can refuse or fail, `IntegrityError` for a file whose hash is not
    the hub's (it is removed), `DoesNotFitError` when the disk is too small.
    """
    asked, kind = parse_name(name), HUBS[hub]
    store = RepoCache(root=kind.cache(), repo=asked.repo)
    revision = asked.revision or kind.branch
    if env.hub_offline():
        return _cached(store, asked, revision)
    client = Client(kind.site(), patience)
    listing = kind.listing(client, asked.repo, revision)
    chosen = _chosen(listing, asked)
    _fetch_all(client, store, listing.commit, chosen, progress)
    if revision != listing.commit:
        store.remember(revision, listing.commit)
    return _result(store.snapshot(listing.commit), [file.name for file in chosen])


def outlined(name: str, *, hub: HubId = "huggingface", patience: Patience = PATIENCE) -> Path:
    """A path for `read` that holds no weights (see `headers.py`); the model itself if it is here.

    Raises as `pull` does.
    """
    asked, kind = parse_name(name), HUBS[hub]
    store = RepoCache(root=kind.cache(), repo=asked.repo)
    if env.hub_offline():
        return _cached(store, asked, asked.revision or kind.branch)
    client = Client(kind.site(), patience)
    listing = kind.listing(client, asked.repo, asked.revision or kind.branch)
    chosen = _chosen(listing, asked)
    names = [file.name for file in chosen]
    if all(store.has(listing.commit, file) for file in chosen):
        return _result(store.snapshot(listing.commit), names)
    folder = outline_folder(asked.repo, listing.commit)
    whole = [file for file in chosen if file.name in WHOLE]
    _fetch_all(client, store, listing.commit, whole, None)
    folder.mkdir(parents=True, exist_ok=True)
    for file in chosen:
        if file in whole:
            shutil.copyfile(store.snapshot(listing.commit) / file.name, folder / file.name)
        else:
            outline(client, asked.repo, file, folder)
    return _result(folder, names)


def verify_hub(
    name: str,
    progress: Progress | None = None,
    *,
    hub: HubId = "huggingface",
    patience: Patience = PATIENCE,
) -> int:
    """Hash the cached files of a name against the hub; returns how many were right.

    Raises `IntegrityError` for a missing or altered file, and what `pull` raises.
    """
    asked, kind = parse_name(name), HUBS[hub]
    if env.hub_offline():
        raise NetworkError(
            "only the hub can say what is right, and HF_HUB_OFFLINE forbids asking it",
            where=asked.repo,
            hint="unset HF_HUB_OFFLINE",
        )
    store = RepoCache(root=kind.cache(), repo=asked.repo)
    listing = kind.listing(Client(kind.site(), patience), asked.repo, asked.revision or kind.branch)
    chosen = _chosen(listing, asked)
    done, total = 0, sum(file.size for file in chosen)
    for file in chosen:
        check(store.snapshot(listing.commit) / file.name, file)
        done += file.size
        if progress is not None:
            progress(done, total)
    return len(chosen)


def cached(name: str, *, hub: HubId = "huggingface") -> Path | None:
    """Where a name lies in the cache, None where it does not; no hub is asked."""
    asked, kind = parse_name(name), HUBS[hub]
    store = RepoCache(root=kind.cache(), repo=asked.repo)
    directory, names = store.recall(asked.revision or kind.branch)
    return _result(directory, pick(names, asked.tag, asked.repo)) if names else None


def _chosen(listing: Listing, asked: HubName) -> list[RemoteFile]:
    files = {file.name: file for file in listing.files}
    return [files[name] for name in pick(list(files), asked.tag, asked.repo)]


def _fetch_all(
    client: Client,
    store: RepoCache,
    commit: str,
    chosen: list[RemoteFile],
    progress: Progress | None,
) -> None:
    absent = [file for file in chosen if not store.has(commit, file)]
    total = sum(file.size for file in chosen)
    done = total - sum(file.size for file in absent)
    _require_space(store.root, sum(file.size - store.present(file) for file in absent))
    for file in absent:
        _fetch(client, store, commit, file, partial(_report, progress, done, total))
        done += file.size
        _report(progress, 0, total, done)


def _fetch(
    client: Client,
    store: RepoCache,
    commit: str,
    file: RemoteFile,
    report: Callable[[int], None],
) -> None:
    """One file into the snapshot; whoever fetches the same bytes already is waited for."""
    with write_errors(store.part(file)), store.locked(file):
        if not store.complete(file):
            client.fetch(file.url, store.part(file), file.size, repo=store.repo, report=report)
        store.add(commit, file)


def _report(progress: Progress | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)


def _require_space(cache: Path, size: int) -> None:
    with write_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    require_space(cache, size)


def _cached(store: RepoCache, asked: HubName, revision: str) -> Path:
    """What the cache alone holds of it."""
    directory, names = store.recall(revision)
    try:
        return _result(directory, pick(names, asked.tag, asked.repo))
    except InvalidInputError as error:
        if names and asked.tag is None:
            raise
        raise NetworkError(
            "not in the cache, and HF_HUB_OFFLINE forbids asking the hub",
            where=asked.repo,
            hint="unset HF_HUB_OFFLINE and pull it once",
        ) from error


def _result(directory: Path, names: list[str]) -> Path:
    return directory / names[0] if names[0].endswith(".gguf") else directory
