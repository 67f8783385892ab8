"""ModelScope: its listing and its addresses; kept in halfbyte's own cache folder.

It names no commit for a listing, so a snapshot is called by a hash of its names and contents. Every
file has a SHA-256. The token travels as a bearer and as the cookie its older services ask for.

Source: https://github.com/modelscope/modelscope_hub (the HTTP API as that client uses it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from halfbyte import env
from halfbyte.errors import IntegrityError
from halfbyte.formats.hub.client import Client, Site
from halfbyte.formats.hub.listing import Listing, RemoteFile, wanted

BRANCH = "master"


def site() -> Site:
    """Where MODELSCOPE_ENDPOINT points, with the token if there is one."""
    endpoint, token = env.modelscope_endpoint(), env.modelscope_token()
    return Site(
        title="ModelScope",
        endpoint=endpoint,
        pages=f"{endpoint}/models/",
        credentials={"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
        if token
        else {},
        endpoint_variable="MODELSCOPE_ENDPOINT",
        token_variable="MODELSCOPE_API_TOKEN",
    )


def cache() -> Path:
    return env.cache_dir() / "modelscope"


def listing(client: Client, repo: str, revision: str) -> Listing:
    """What a branch, tag or commit holds."""
    place, revision = f"/api/v1/models/{repo}/repo", quote(revision)
    answer = client.json(f"{place}/files?Revision={revision}&Recursive=True", repo=repo)
    data = answer.get("Data")
    if not isinstance(data, dict):
        message = str(answer.get("Message"))[:200]
        raise IntegrityError(f"the hub lists no files: {message}", where=repo)
    address = f"{client.site.endpoint}{place}?Revision={revision}&FilePath="
    items = wanted(data.get("Files"), repo, lambda item: item.get("Path"))
    files = tuple(_file(name, item, address) for name, item in items if item.get("Type") != "tree")
    return Listing(repo=repo, commit=_content_name(files), files=files)


def _file(name: str, item: dict[str, Any], address: str) -> RemoteFile:
    size = item.get("Size")
    if not isinstance(size, int):
        raise IntegrityError("the hub gives no size", where=name)
    return RemoteFile(
        name=name,
        size=size,
        digest=str(item.get("Sha256")).lower(),
        kind="sha256",
        url=address + quote(name, safe=""),
    )


def _content_name(files: Iterable[RemoteFile]) -> str:
    """40 hexadecimal digits that differ when any name or content does."""
    lines = sorted(f"{file.digest} {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]
