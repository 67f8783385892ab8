"""Hugging Face: its listing, its addresses, and the cache it shares with other programs.

Source: https://huggingface.co/docs/hub/api (model info with `blobs=true`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from halfbyte import env
from halfbyte.errors import IntegrityError
from halfbyte.formats.hub.client import Client, Site
from halfbyte.formats.hub.listing import Listing, RemoteFile, wanted

BRANCH = "main"


def site() -> Site:
    """Where HF_ENDPOINT points, with the token if there is one."""
    endpoint, token = env.hub_endpoint(), env.hub_token() or _stored_token()
    return Site(
        title="Hugging Face",
        endpoint=endpoint,
        pages=f"{endpoint}/",
        credentials={"Authorization": f"Bearer {token}"} if token else {},
        endpoint_variable="HF_ENDPOINT",
        token_variable="HF_TOKEN",
    )


def cache() -> Path:
    return env.hub_cache()


def listing(client: Client, repo: str, revision: str) -> Listing:
    """What a branch, tag or commit holds."""
    answer = client.json(f"/api/models/{repo}/revision/{quote(revision)}?blobs=true", repo=repo)
    commit = str(answer.get("sha"))
    address = f"{client.site.endpoint}/{repo}/resolve/{commit}/"
    items = wanted(answer.get("siblings"), repo, lambda item: item.get("rfilename"))
    files = tuple(_file(name, item, address) for name, item in items)
    return Listing(repo=repo, commit=commit, files=files)


def _stored_token() -> str | None:
    """What a login with the hub's own program left."""
    try:
        return env.hub_token_file().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _file(name: str, item: dict[str, Any], address: str) -> RemoteFile:
    """Large files have a SHA-256, the others git's name of their content."""
    large, size = item.get("lfs"), item.get("size")
    if not isinstance(size, int):
        raise IntegrityError("the hub gives no size", where=name)
    return RemoteFile(
        name=name,
        size=size,
        digest=str(large.get("sha256")) if isinstance(large, dict) else str(item.get("blobId")),
        kind="sha256" if isinstance(large, dict) else "git-sha1",
        url=address + quote(name),
    )
