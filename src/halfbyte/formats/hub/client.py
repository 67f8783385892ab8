"""Requests to a hub: JSON answers, and files that go on where they stopped.

What it holds to: a file in transfer grows and never starts over without need; a server that sends
nothing, breaks off, is overloaded or fails is asked again a bounded number of times; a server that
refuses is not. Credentials go to the hub's own address only, never to one it redirects to. There
are no other requests: no telemetry, no look-ups.

The standard library's HTTP client does the talking (it honours http_proxy, https_proxy, no_proxy
and SSL_CERT_FILE). huggingface_hub is not used: since 2.0 a process that is killed leaves nothing
to resume from, and it asks the hub for more than it was told to (a registry of agent programs).
The price is speed: one connection, and no xet. What it is not: a guard against a server that drips.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from time import sleep
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from halfbyte import __version__
from halfbyte.errors import HalfbyteError, IntegrityError, InvalidInputError, NetworkError

CHUNK = 1 << 20
GAIN = 1 << 20  # so many new bytes are progress, and the count of failures starts again
LARGEST_ANSWER = 1 << 25
PASSING = {408, 416, 429}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When to give up, in seconds and in failures without progress."""

    timeout_s: float = 30.0
    attempts: int = 5  # for a file
    asks: int = 3  # for an answer: somebody waits for it
    pause_s: float = 1.0
    longest_wait_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A hub's address, who asks, and what its knobs are called.

    `pages` + a repository's name is its page for people. Raises `InvalidInputError` for an address
    that is none.
    """

    title: str
    endpoint: str
    pages: str
    credentials: Mapping[str, str]
    endpoint_variable: str
    token_variable: str

    def __post_init__(self) -> None:
        address = urlsplit(self.endpoint)
        if address.scheme not in {"http", "https"} or not address.hostname:
            raise InvalidInputError(
                f"'{self.endpoint[:200]}' is no address",
                where=self.endpoint_variable,
                hint="give https://HOST, or unset it",
            )
        if not all(value.isascii() and value.isprintable() for value in self.credentials.values()):
            raise InvalidInputError("holds characters no token has", where=self.token_variable)


class Trouble(Exception):
    """A request that failed: `status` None means no answer, or one that broke off."""

    def __init__(
        self, what: str, *, status: int | None = None, code: str = "", wait_s: float | None = None
    ) -> None:
        super().__init__(what)
        self.what, self.status, self.code, self.wait_s = what, status, code, wait_s

    @property
    def may_pass(self) -> bool:
        return self.status is None or self.status in PASSING or self.status >= 500


class Client:
    """Asks one hub, patiently."""

    def __init__(self, site: Site, patience: Patience) -> None:
        self.site = site
        self._patience = patience
        self._opener = build_opener(_Redirects(site))

    def json(self, path: str, *, repo: str) -> dict[str, Any]:
        """The JSON object at a path below the endpoint, at most `LARGEST_ANSWER` bytes of it."""
        failures = 0
        while True:
            try:
                data = self._read(self.site.endpoint + path)
                break
            except Trouble as trouble:
                failures += 1
                self._pause(trouble, failures, self._patience.asks, repo)
        return _object(data, repo)

    def fetch(
        self, url: str, part: Path, size: int, *, repo: str, report: Callable[[int], None]
    ) -> None:
        """Append to `part` until it has `size` bytes; `report` hears how many there are.

        What is there already is kept and the rest asked for. `OSError`s of the disk pass through.
        """
        part.touch()
        if part.stat().st_size > size:
            part.write_bytes(b"")
        failures, mark = 0, part.stat().st_size
        while (have := part.stat().st_size) < size:
            try:
                self._append(url, part, have, size, report)
            except Trouble as trouble:
                have = part.stat().st_size
                if have >= mark + GAIN:
                    failures, mark = 0, have
                failures += 1
                if trouble.status == 416:
                    part.write_bytes(b"")
                self._pause(trouble, failures, self._patience.attempts, repo)

    def part(self, url: str, start: int, stop: int, *, repo: str) -> bytes:
        """Bytes `[start, stop)` of a file; fewer where it ends before. Nothing else is sent."""
        failures = 0
        while start < stop:
            try:
                return self._part(url, start, stop)
            except Trouble as trouble:
                failures += 1
                self._pause(trouble, failures, self._patience.asks, repo)
        return b""

    def _part(self, url: str, start: int, stop: int) -> bytes:
        with self._open(url, start, stop) as response:
            if _start(response, start) != start:
                raise Trouble("serves no part of a file", status=response.status)
            try:
                return response.read(stop - start)
            except (OSError, HTTPException) as error:
                raise Trouble(_said(error)) from error

    def _read(self, url: str) -> bytes:
        with self._open(url) as response:
            try:
                return response.read(LARGEST_ANSWER + 1)
            except (OSError, HTTPException) as error:
                raise Trouble(_said(error)) from error

    def _append(
        self, url: str, part: Path, have: int, size: int, report: Callable[[int], None]
    ) -> None:
        with self._open(url, have) as response:
            done = _start(response, have)
            with part.open("ab") as file:
                file.truncate(done)
                for chunk in _chunks(response, size - done):
                    file.write(chunk)
                    done += len(chunk)
                    report(done)
                file.flush()
                os.fsync(file.fileno())

    def _open(
        self, url: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[HTTPResponse]:
        request = Request(url, headers={"User-Agent": f"halfbyte/{__version__}"})
        if start or stop is not None:
            last = "" if stop is None else stop - 1
            request.add_header("Range", f"bytes={start}-{last}")
        _identify(request, self.site)
        try:
            answer = self._opener.open(request, timeout=self._patience.timeout_s)
            return cast("AbstractContextManager[HTTPResponse]", answer)
        except HTTPError as error:
            with error:
                raise _answered(error) from error
        except (OSError, HTTPException) as error:
            raise Trouble(f"cannot be reached: {_said(error)}") from error

    def _pause(self, trouble: Trouble, failures: int, attempts: int, repo: str) -> None:
        """Wait before the next attempt, or raise `NetworkError` when there is none."""
        wait_s = self._patience.pause_s * 2 ** (failures - 1)
        if trouble.wait_s is not None:
            wait_s = trouble.wait_s
        too_long = wait_s > self._patience.longest_wait_s
        if not trouble.may_pass or failures >= attempts or too_long:
            raise _explained(trouble, self.site, repo) from trouble
        sleep(wait_s)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects; credentials stay with the hub's own origin, and TLS is not given up."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        target, before = urlsplit(newurl), urlsplit(req.full_url)
        if target.scheme != "https" and target.scheme != before.scheme:
            raise URLError(f"redirected to {target.scheme}://{target.netloc}")
        onward = super().redirect_request(req, fp, code, msg, headers, newurl)
        if onward is not None and _origin(newurl) == _origin(self._site.endpoint):
            _identify(onward, self._site)
        return onward


def _identify(request: Request, site: Site) -> None:
    for name, value in site.credentials.items():
        request.add_unredirected_header(name, value)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _start(response: HTTPResponse, have: int) -> int:
    """Where the body begins: at `have`, or at 0 when the server ignores ranges."""
    if response.status == 200:
        return 0
    span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status == 206 and span is not None and int(span[1]) == have:
        return have
    raise Trouble(f"another range than asked for ({response.status})")


def _chunks(response: HTTPResponse, length: int) -> Generator[bytes]:
    """`length` bytes as they come."""
    while length:
        try:
            chunk = response.read1(min(length, CHUNK))
        except (OSError, HTTPException) as error:
            raise Trouble(_said(error)) from error
        if not chunk:
            raise Trouble(f"the transfer broke off, {length} bytes short")
        length -= len(chunk)
        yield chunk


def _answered(error: HTTPError) -> Trouble:
    wait = error.headers.get("Retry-After", "")
    return Trouble(
        f"the hub answered {error.code}",
        status=error.code,
        code=error.headers.get("X-Error-Code", ""),
        wait_s=float(wait) if wait.isascii() and wait.isdigit() else None,
    )


def _said(error: Exception) -> str:
    """A library's error in one short line."""
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return "nothing came for too long"
    text = str(reason).strip().split("\n", 1)[0][:200]
    return text if isinstance(reason, str) else f"{type(reason).__name__}: {text}"


def _explained(trouble: Trouble, site: Site, repo: str) -> HalfbyteError:
    """What the trouble means for a person, and what to do."""
    token, page = site.token_variable, site.pages + repo
    gated = (
        f"the model is gated ({trouble.status})",
        f"accept its licence at {page}, then set {token} to a token of that account",
    )
    meanings = {
        401: (
            "no such model, or it is private or gated and there is no valid token (401)",
            f"check the name; else accept the licence at {page} and set {token}",
        ),
        403: (
            "the token has no access to this model (403)",
            f"accept the model's licence at {page}, with the account of {token}",
        ),
        200: (f"{site.title} {trouble.what}", "pull the model, and name it again"),
        404: (
            f"no such model, revision or file on {site.title} (404)",
            f"check the name: org/name, or org/name@revision; it would be at {page}",
        ),
        429: (
            "the hub limits how often you ask (429)",
            f"wait {_minutes(trouble.wait_s)}, or set {token}; what has arrived is kept",
        ),
        None: (
            f"{site.endpoint}: {trouble.what}",
            f"check the connection and {site.endpoint_variable}; what has arrived is kept, "
            "and HF_HUB_OFFLINE=1 uses what is cached",
        ),
    }
    other = (trouble.what, "try again later; what has arrived is kept")
    what, hint = gated if trouble.code == "GatedRepo" else meanings.get(trouble.status, other)
    return NetworkError(what, where=repo, hint=hint)


def _minutes(wait_s: float | None) -> str:
    return "some minutes" if wait_s is None else f"{max(1, round(wait_s / 60))} min"


def _object(data: bytes, repo: str) -> dict[str, Any]:
    if len(data) > LARGEST_ANSWER:
        raise IntegrityError(f"the hub's answer is over {LARGEST_ANSWER} bytes", where=repo)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"the hub's answer is not JSON: {error}", where=repo) from error
    if not isinstance(document, dict):
        raise IntegrityError("the hub's answer is no JSON object", where=repo)
    return cast("dict[str, Any]", document)
