"""The page's files, read once, under a policy that lets nothing else in.

No file is named by a request: the routes are those of the files that there are.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    """A route for every file; the page itself is at the root."""
    found: list[Route] = []
    for entry in files("halfbyte.serve.page").iterdir():
        kind = KINDS.get(entry.name.rpartition(".")[2])
        if kind is not None:
            endpoint = _endpoint(entry.read_bytes(), kind)
            found.append(Route(f"/page/{entry.name}", endpoint, methods=["GET"]))
            if entry.name == "index.html":
                found.append(Route("/", endpoint, methods=["GET"]))
            if entry.name == "icon.svg":
                found.append(Route("/favicon.ico", endpoint, methods=["GET"]))
    return found


def _endpoint(data: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{sha256(data).hexdigest()[:16]}"'

    async def endpoint(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={**HEADERS, "etag": tag})
        return Response(data, media_type=kind, headers={**HEADERS, "etag": tag})

    return endpoint
