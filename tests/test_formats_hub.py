"""The hub, played by a small server on 127.0.0.1 that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from halfbyte.errors import DoesNotFitError, IntegrityError, InvalidInputError, NetworkError
from halfbyte.formats import hub
from halfbyte.formats.checkpoint import read
from halfbyte.formats.reference import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "maker/model"


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class FakeHub:
    """`files` of one repository; `sent` is what goes over the wire where it differs."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)
    status: int = 200
    error_code: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)

    def fetched(self) -> list[str]:
        return sorted(
            path.rsplit("/", 1)[1]
            for verb, path in self.requests
            if verb == "GET" and "/resolve/" in path
        )

    def listing(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name, data in self.files.items():
            item: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if is_large(name):
                sha256 = hashlib.sha256(data).hexdigest()
                item["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(item)
        return {"_id": "1", "id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf", ".bin"))


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.hub.tokens[path] = self.headers.get("Authorization", "")
        if self.hub.status != 200:
            return self.send(self.hub.status, b"{}", {"X-Error-Code": self.hub.error_code})
        if path == f"/api/models/{REPO}/revision/main":
            return self.send(200, json.dumps(self.hub.listing()).encode(), {})
        name = path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
        if name not in self.hub.files:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        data = self.hub.files[name]
        etag = hashlib.sha256(data).hexdigest() if is_large(name) else git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self.send(200, self.hub.sent.get(name, data), headers)

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        span = self.headers.get("Range")
        if span and status == 200:
            first, _, last = span.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[int(first) : int(last) + 1 if last else None]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def fake(tmp_path: Path, stories260k: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[FakeHub]:
    """A hub with stories260K, and files that nobody should fetch."""
    state = FakeHub(files={file.name: file.read_bytes() for file in stories260k.iterdir()})
    state.files |= {
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"print()",
        "sub/model.safetensors": b"other",
        "../escape.json": b"{}",
        ".gitattributes": b"",
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", state.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "TIMEOUT_S", 5.0)
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def test_pull_fetches_data_only_and_once(
    fake: FakeHub, stories260k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    path = hub.pull(REPO, lambda *done: seen.append(done))
    names = {
        file.name
        for file in stories260k.iterdir()
        if file.suffix in {".json", ".safetensors", ".txt"}
    }
    assert {file.name for file in path.iterdir()} == names
    assert read(path).spec == read(stories260k).spec
    assert seen[-1][0] == seen[-1][1] == sum(len(fake.files[name]) for name in names)
    assert {token for path, token in fake.tokens.items() if REPO in path} == {"Bearer hf_secret"}
    assert hub.verify_hub(REPO) == len(names)
    before = len(fake.fetched())
    assert locate(REPO) == path and len(fake.fetched()) == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(fake.requests)
    assert locate(REPO) == path and len(fake.requests) == asked


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_is_not_what_the_hub_said(fake: FakeHub, name: str) -> None:
    wrong = bytearray(fake.files[name])
    wrong[-1] ^= 1
    fake.sent = {name: bytes(wrong)}
    with pytest.raises(IntegrityError, match=rf"{name}: .* the hub says \w+, found \w+"):
        hub.pull(REPO)
    fake.sent = {}
    assert (hub.pull(REPO) / name).read_bytes() == fake.files[name], "the wrong file was removed"


def test_damage_in_the_cache(fake: FakeHub) -> None:
    file = hub.pull(REPO) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.resolve().write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: sha256"):
        hub.verify_hub(REPO)


def test_a_gguf_is_picked_by_its_scheme(fake: FakeHub) -> None:
    names = ("x-Q4_0.gguf", "x-Q4_0_4_4.gguf", "x-q8_0.gguf", "mmproj-x-Q4_0.gguf")
    fake.files = {name: name.encode() for name in names} | {"config.json": b"{}"}
    assert hub.pull(f"{REPO}:q4_0").name == "x-Q4_0.gguf"
    assert hub.pull(f"{REPO}:Q8_0").read_bytes() == b"x-q8_0.gguf"
    assert fake.fetched() == ["x-Q4_0.gguf", "x-q8_0.gguf"]
    for reference in (REPO, f"{REPO}:Q6_K"):
        with pytest.raises(InvalidInputError, match=r"pick one as maker/model:TAG .*x-Q4_0\.gguf"):
            hub.pull(reference)
    fake.files = {"only.gguf": b"only", "mmproj.gguf": b"eyes"}
    assert hub.pull(REPO).name == "only.gguf"


@pytest.mark.parametrize(
    ("status", "code", "hint"),
    [
        (401, "RepoNotFound", "HF_TOKEN"),
        (403, "GatedRepo", "accept the model's licence"),
        (404, "RepoNotFound", "check the name"),
        (429, "", "wait some minutes"),
        (503, "", "try again later"),
    ],
)
def test_refusals(fake: FakeHub, status: int, code: str, hint: str) -> None:
    fake.status, fake.error_code = status, code
    with pytest.raises(NetworkError, match=hint) as caught:
        hub.pull(REPO)
    assert str(status) in caught.value.what and caught.value.where == REPO


def test_no_hub_at_all(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:9 cannot be reached"):
        hub.pull(REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE forbids"):
        hub.pull(REPO)


def test_too_small_a_disk(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    with pytest.raises(DoesNotFitError):
        hub.pull(REPO)
    assert fake.fetched() == []


@pytest.mark.parametrize(
    "reference",
    ["", "name", "a/b/c", "../x", "a/..", "a/b:", "a/b:..", "-a/b", "a/b c", "/etc/none", "a--b/c"],
)
def test_what_is_no_reference(reference: str) -> None:
    with pytest.raises(InvalidInputError, match="no name on the hub"):
        hub.pull(reference)


def test_paths_that_exist_are_themselves(tmp_path: Path) -> None:
    assert locate(str(tmp_path)) == tmp_path
