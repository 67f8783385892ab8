"""Both hubs, played by two small servers on 127.0.0.1: one answers, one holds the large files.

It serves one repository, notes every request, and can be told to fail: `faults` are spent one per
request for a file, `refusals` one per request for a listing.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "maker/model"
LARGE = (".safetensors", ".gguf", ".bin")
LONGEST_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Answer `status` instead, or send `after` bytes of the body and then `stall` or break off."""

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    after: int = -1
    stall: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it came in."""

    server: str
    method: str
    path: str
    query: str
    range: str
    authorization: str
    cookie: str


@dataclass
class FakeHub:
    """`files` of one repository; `sent` is what goes over the wire where it differs.

    `served` counts the bytes of files that went.
    """

    files: dict[str, bytes]
    sent: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    refusals: list[Fault] = field(default_factory=list)
    requests: list[Asked] = field(default_factory=list)
    ranges: bool = True
    redirects: bool = True
    hashes: bool = True
    filler: int = 0
    hub: str = ""
    store: str = ""
    served: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def fetched(self) -> list[str]:
        """The names whose bytes were asked for, in order of their name."""
        return sorted(asked.path.rsplit("/", 1)[1] for asked in self.transfers())

    def transfers(self) -> list[Asked]:
        return [asked for asked in self.requests if asked.path.startswith("/bytes/")]

    def huggingface(self) -> dict[str, Any]:
        items: list[dict[str, Any]] = []
        for name, data in self.files.items():
            item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if name.endswith(LARGE):
                item["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            if not self.hashes:
                item |= {"blobId": "../../x", "lfs": None}
            items.append(item)
        items += [{"rfilename": f"{i}.json", "size": 1, "blobId": "0" * 40} for i in self.extra()]
        return {"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": items}

    def modelscope(self) -> dict[str, Any]:
        items: list[dict[str, Any]] = [{"Name": "sub.json", "Path": "sub.json", "Type": "tree"}]
        for name, data in self.files.items():
            item = {"Name": name.rsplit("/", 1)[-1], "Path": name, "Size": len(data)}
            item |= {"Sha256": sha256(data) if self.hashes else "", "Type": "blob"}
            items.append(item)
        return {"Code": 200, "Success": True, "Data": {"Files": items}, "Message": "success"}

    def extra(self) -> range:
        return range(self.filler)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(state: FakeHub) -> Generator[FakeHub]:
    """Runs both servers while the block runs."""
    servers = [_server(state, role) for role in ("hub", "store")]
    state.hub, state.store = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        for server in servers
    ]
    for thread in threads:
        thread.start()
    try:
        yield state
    finally:
        state.released.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _server(state: FakeHub, role: str) -> ThreadingHTTPServer:
    handler = type("Bound", (_Handler,), {"state": state, "role": role})
    return ThreadingHTTPServer(("127.0.0.1", 0), handler)


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    role: str

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.state.requests.append(
            Asked(
                server=self.role,
                method=self.command,
                path=path,
                query=address.query,
                range=self.headers.get("Range", ""),
                authorization=self.headers.get("Authorization", ""),
                cookie=self.headers.get("Cookie", ""),
            )
        )
        if path.startswith("/bytes/"):
            return self.send_file(path.removeprefix("/bytes/"))
        if path.startswith("/api/") and not path.endswith("/repo"):
            return self.send_listing(path)
        return self.send_place(path, parse_qs(address.query))

    def send_listing(self, path: str) -> None:
        if self.state.refusals:
            fault = self.state.refusals.pop(0)
            return self.send(fault.status, b"{}", fault.headers)
        if path == f"/api/v1/models/{REPO}/repo/files":
            return self.send(200, json.dumps(self.state.modelscope()).encode())
        if path in (f"/api/models/{REPO}/revision/{name}" for name in ("main", "v2", COMMIT)):
            return self.send(200, json.dumps(self.state.huggingface()).encode())
        return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_place(self, path: str, query: Mapping[str, list[str]]) -> None:
        """A file's address: it is elsewhere."""
        name = query.get("FilePath", [path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")])[0]
        base = self.state.store if self.state.redirects and name.endswith(LARGE) else ""
        self.send(302, b"", {"Location": f"{base}/bytes/{quote(name)}?signed=1"})

    def send_file(self, name: str) -> None:
        data = self.state.sent.get(name, self.state.files.get(name))
        fault = self.state.faults.pop(0) if self.state.faults else Fault()
        if fault.status or data is None:
            return self.send(fault.status or 404, b"{}", fault.headers)
        asked = self.headers.get("Range", "bytes=0-") if self.state.ranges else "bytes=0-"
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data)) if last else len(data)
        if start and start >= len(data):
            return self.send(416, b"")
        partial = start > 0 or bool(last)
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        body = data[start:stop]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.state.served += len(body)
        self.wfile.write(body if fault.after < 0 else body[: fault.after])
        self.wfile.flush()
        if fault.stall:
            self.state.released.wait(LONGEST_S)
        self.close_connection = True

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
