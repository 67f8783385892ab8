"""The outermost layer: who may come in, and with how much. Pure ASGI, so that leaving is noticed.

Default deny: with keys set, every path needs one but those named here. What is looked at is the
path of the request as it came, never an address put together from headers. Keys are compared in
constant time. Without keys a server on this machine alone answers to its own names only, so that no
web page can reach it through a name of its own.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Mapping
from time import perf_counter
from urllib.parse import urlsplit

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.serve.failure import Failure
from halfbyte.serve.settings import MIN_BODY_RATE, Settings

OPEN = frozenset({"/health", "/v1/health", "/livez", "/readyz"})
PAGE = ("/", "/favicon.ico")  # and what lies under /page/: it has no secrets, and asks for the key
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
ALLOWED = "authorization, content-type, x-api-key, anthropic-version, anthropic-beta"
ANTHROPIC = "/v1/messages"

Log = Callable[[str, int], None]


class Guard:
    """Lets a request through to `app`, or answers it. `log` is told route and status of each."""

    def __init__(self, app: ASGIApp, settings: Settings, log: Log) -> None:
        self._app = app
        self._settings = settings
        self._log = log
        self._keys = [key.encode() for key in settings.keys]
        own = set() if settings.is_public else LOCAL | {settings.host.lower()}
        self._hosts = frozenset({*own, *(host.lower() for host in settings.hosts)})
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        reply = _Reply(send, self._cors(headers))
        self._inside += 1
        try:
            answer = self._answer(scope, headers)
            bounded = _Body(receive, self._settings)
            await (answer or self._app)(scope, bounded, reply)
        except Failure as failure:
            if reply.status is None:
                await respond(failure, scope)(scope, receive, reply)
        finally:
            self._inside -= 1
            route = getattr(scope.get("route"), "path", None) or "none"
            self._log(route, reply.status or 499)

    def _answer(self, scope: Scope, headers: Mapping[str, str]) -> Response | None:
        """An answer that needs no route; raises `Failure` for who may not come in."""
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD"):
            self._check_origin(origin, headers)
        if scope["method"] == "OPTIONS":
            return Response(status_code=204)
        self._check_key(scope, headers)
        self._check_room()
        if int(_number(headers.get("content-length"))) > self._settings.body_bytes:
            raise self._too_large()
        if headers.get("content-encoding", "identity") != "identity":
            raise Failure(415, "send the body as it is, without a content encoding")
        return None

    def _check_host(self, headers: Mapping[str, str]) -> None:
        if not self._hosts:
            return
        host = _host(headers.get("host", ""))
        if host not in self._hosts:
            raise Failure(
                403,
                f"this server is not called '{host[:100]}'; --allow-host adds a name",
                "host_not_allowed",
            )

    def _check_origin(self, origin: str, headers: Mapping[str, str]) -> None:
        if origin in self._settings.origins:
            return
        try:
            same = urlsplit(origin).netloc.lower() == headers.get("host", "").lower()
        except ValueError:
            same = False
        if not same:
            raise Failure(
                403,
                f"pages from '{origin[:100]}' may not call this server; --cors-origin allows it",
                "origin_not_allowed",
            )

    def _check_key(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if not self._keys or self._is_open(scope):
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        found = [hmac.compare_digest(key, given.encode()) for key in self._keys]
        if not any(found):
            raise Failure(
                401,
                "a key is needed: send it as 'Authorization: Bearer KEY'"
                if not given
                else "this key is not known",
                "invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _check_room(self) -> None:
        if self._inside > self._settings.connections:
            raise Failure(
                503, "too many requests are open", "overloaded", headers={"retry-after": "5"}
            )

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        if path in OPEN or (path == "/metrics" and not self._settings.is_public):
            return True
        return path in PAGE or path.startswith("/page/")

    def _cors(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        origin = headers.get("origin")
        if origin is None or origin not in self._settings.origins:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", ALLOWED.encode()),
            (b"vary", b"origin"),
        ]

    def _too_large(self) -> Failure:
        return too_large(self._settings.body_bytes)


class _Body:
    """The body as it arrives, bounded in size, and in time by how much of it has come."""

    def __init__(self, receive: Receive, settings: Settings) -> None:
        self._receive = receive
        self._settings = settings
        self._size = 0
        self._begun = asyncio.get_running_loop().time()
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            allowed_s = self._settings.body_s + self._size / MIN_BODY_RATE
            async with asyncio.timeout_at(self._begun + allowed_s):
                message = await self._receive()
        except TimeoutError:
            raise Failure(408, "the body did not arrive in time") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._settings.body_bytes:
            raise too_large(self._settings.body_bytes)
        return message


class _Reply:
    """Adds headers to an answer, and knows its status."""

    def __init__(self, send: Send, cors: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._cors = cors
        self._start = perf_counter()
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            taken = f"{1e3 * (perf_counter() - self._start):.0f}"
            message["headers"] = [
                *message.get("headers", ()),
                *self._cors,
                (b"x-request-id", f"req_{secrets.token_hex(12)}".encode()),
                (b"openai-processing-ms", taken.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self._send(message)


def respond(failure: Failure, scope: Scope) -> Response:
    """A failure as the clients of its route read it."""
    anthropic = scope["path"].startswith(ANTHROPIC)
    document = failure.anthropic() if anthropic else failure.document()
    return JSONResponse(document, failure.status, headers={**failure.headers})


def too_large(limit: int) -> Failure:
    """A body beyond its bound."""
    return Failure(413, f"the body is larger than {limit} bytes", "request_too_large")


def _host(header: str) -> str:
    """The name in a Host header, without port, brackets and the dot of the root."""
    name = header.lower()
    if name.startswith("["):
        inside, closes, _ = name[1:].partition("]")
        return inside if closes else name
    return name.partition(":")[0].removesuffix(".")


def _number(text: str | None) -> int:
    """Of decimal digits, of which a few are enough to be too large; 0 for what is no number."""
    return int(text[:20]) if text is not None and text.isascii() and text.isdigit() else 0
