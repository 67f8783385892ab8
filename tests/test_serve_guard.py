"""Who may come in, and with how much: every trick known from other servers, over a real socket."""

from __future__ import annotations

import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from served import WAIT_S, Served, serving

from halfbyte.errors import InvalidInputError
from halfbyte.llm import LLM
from halfbyte.serve import running
from halfbyte.serve.settings import Settings, require_a_key
from halfbyte.specs import LoadOptions

KEY = "sk-first"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
API = "/v1/chat/completions"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", LoadOptions(context=256, threads=1, parallel=4, spare=1))


@pytest.fixture(scope="module")
def served(llm: LLM) -> Iterator[Served]:
    with serving(llm, body_bytes=2**16, body_s=1.0) as it:
        yield it


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    llm = LLM("demo", LoadOptions(context=256, threads=1))
    with serving(llm, keys=(KEY, "sk-second"), origins=("http://app.example",)) as it:
        yield it


def raw(served: Served, data: bytes, wait_s: float = WAIT_S) -> bytes:
    """What comes back for these very bytes, until the server closes or is silent."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=wait_s) as connection:
        found = b""
        try:
            connection.sendall(data)
            while more := connection.recv(65536):
                found += more
                head, _, body = found.partition(b"\r\n\r\n")
                size = [line for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
                if size and len(body) >= int(size[0].split(b":")[1]):
                    break
        except (TimeoutError, ConnectionError):
            pass
        return found


def head(path: str, *lines: str, method: str = "GET", host: str = "localhost") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def status(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


def test_every_route_but_the_open_ones_wants_a_key(locked: Served):
    document = locked.get("/openapi.json", authorization=f"Bearer {KEY}").json
    for path, methods in document["paths"].items():
        for method in methods:
            reply = locked.send(method.upper(), path.replace("{name}", "demo"), {})
            public = path in ("/health", "/v1/health", "/livez", "/readyz", "/metrics")
            assert (reply.status == 401) != public, path
            if reply.status == 401:
                assert reply.headers["www-authenticate"] == "Bearer"
                assert reply.json["error"]["type"] == "authentication_error"
    for path in ("/nope", "/openapi.json", "/v1", "/docs", "/page"):
        assert locked.get(path).status == 401
    assert locked.get("/").status == 200  # the page asks for the key


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-second"},
        {"authorization": f"bearer  {KEY} "},
        {"x-api-key": KEY},
    ],
)
def test_any_of_the_keys_opens(locked: Served, headers):
    assert locked.send("POST", API, BODY, headers).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-firs"},
        {"authorization": "Bearer sk-first2"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": KEY},
        {"x-api-key": ""},
        {"authorization": "Bearer sk-f\xefrst"},
        {"cookie": f"key={KEY}"},
    ],
)
def test_nothing_else_does(locked: Served, headers):
    assert locked.send("POST", API, BODY, headers).status == 401
    assert locked.send("POST", f"{API}?api_key={KEY}", BODY, headers).status == 401


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models",
        "/health/../v1/models",
        "/health%2f..%2fv1/models",
        "/page/../v1/models",
        "/page/%2e%2e/v1/models",
        "/page/..%2f..%2fv1/models",
        "/v1/models/",
        "/V1/MODELS",
        "/./v1/models",
        "/v1/models%00",
        "/page//etc/passwd",
        "/page/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "http://localhost/v1/models",
        "/health?/../v1/models",
        "/v1/models;/health",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(locked: Served, path):
    answer = raw(locked, head(path))
    assert b'"object":"list"' not in answer and b"root:" not in answer
    assert status(answer) in (400, 401, 404, 200)
    if status(answer) == 200:
        assert b'{"status":"ok"}' in answer


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil@localhost",
             "", "[::1", "localhost/v1", "169.254.169.254"]
)  # fmt: skip
def test_other_names_are_not_ours(served: Served, host):
    answer = raw(served, head("/v1/models", host=host))
    assert status(answer) in (400, 403) and b'"data"' not in answer


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:80", "[::1]:8470"]
)
def test_our_names_are(served: Served, host):
    assert status(raw(served, head("/v1/models", host=host))) == 200


def test_two_host_lines_are_refused(served: Served):
    assert status(raw(served, head("/v1/models", "Host: evil.example"))) == 400


def test_pages_of_others_may_not_call(served: Served, locked: Served):
    for origin in ("http://evil.example", "null", "http://localhost:1", "file://", "http://["):
        reply = served.send("POST", API, BODY, {"origin": origin})
        assert reply.status == 403 and reply.json["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in reply.headers
    own = {"origin": f"http://127.0.0.1:{served.port}"}
    assert served.send("POST", API, BODY, own).status == 200
    allowed = {"origin": "http://app.example", "authorization": f"Bearer {KEY}"}
    reply = locked.send("POST", API, BODY, allowed)
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "http://app.example"
    assert "access-control-allow-credentials" not in reply.headers
    ask = {"origin": "http://app.example", "access-control-request-method": "POST"}
    assert locked.send("OPTIONS", API, None, ask).status == 204
    ask["origin"] = "http://evil.example"
    assert locked.send("OPTIONS", API, None, ask).status == 403


def test_a_body_is_bounded(served: Served):
    large = b'{"messages": "' + b"x" * 2**17 + b'"}'
    reply = served.send("POST", API, large[: 2**16 + 1])
    assert reply.status == 413 and reply.json["error"]["code"] == "request_too_large"
    told = head(API, "Content-Length: 1000000000", method="POST")
    assert status(raw(served, told)) == 413
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [b"x" * 2**14] * 8)
    chunked = head(API, "Transfer-Encoding: chunked", method="POST") + chunks + b"0\r\n\r\n"
    assert status(raw(served, chunked)) == 413


def test_a_body_that_is_packed_is_not_opened(served: Served):
    bomb = gzip.compress(b"0" * 10**7)
    reply = served.send("POST", API, bomb, {"content-encoding": "gzip"})
    assert reply.status == 415


def test_a_body_that_does_not_come_is_not_waited_for(served: Served):
    start = time.monotonic()
    answer = raw(served, head(API, "Content-Length: 100", method="POST") + b"{")
    assert status(answer) == 408 and time.monotonic() - start < 20


def test_a_head_is_bounded(served: Served):
    """The other parser takes one of 50 MB."""
    fine = head("/health", "X-Long: " + "x" * 2**15)
    assert status(raw(served, fine)) == 200
    answer = raw(served, head("/health", "X-Long: " + "x" * 2**22))
    assert status(answer) in (0, 400, 431)


def test_a_head_that_does_not_come_is_not_waited_for(llm: LLM, monkeypatch):
    monkeypatch.setattr(running, "HEAD_S", 0.3)
    with serving(llm) as served:
        slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(60)]
        for connection in slow:
            connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert served.get("/health").status == 200
        for connection in slow:
            connection.settimeout(WAIT_S)
            with suppress(ConnectionError):
                assert connection.recv(10) == b""
            connection.close()
        assert served.get("/health").status == 200


def healthy(connection: socket.socket) -> bool:
    """Whether the server still answers on this connection, to the end of the answer."""
    connection.settimeout(WAIT_S)
    connection.sendall(head("/health", method="GET"))
    found = b""
    while not found.endswith(b'{"status":"ok"}') and (more := connection.recv(65536)):
        found += more
    return found.startswith(b"HTTP/1.1 200")


def test_who_has_no_request_makes_room(llm: LLM):
    """Beyond the bound of connections the one goes that has been idle for longest."""
    with serving(llm, connections=8) as served:
        idle = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(8)]
        time.sleep(0.3)  # all are in, and none but them
        for connection in idle[:4]:
            assert healthy(connection)
        assert served.send("POST", API, BODY).status == 200
        idle[4].settimeout(WAIT_S)
        with suppress(ConnectionError):
            assert idle[4].recv(10) == b""  # the first of those that had never asked
        assert healthy(idle[0])
        for connection in idle:
            connection.close()


def test_where_all_are_busy_the_next_is_told_to_come_back(llm: LLM):
    with serving(llm, connections=4, body_s=2.0) as served:
        slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(4)]
        for connection in slow:
            connection.sendall(head(API, "Content-Length: 100", method="POST") + b"{")
        time.sleep(0.3)
        reply = served.send("POST", API, BODY)
        assert reply.status == 503 and reply.json["error"]["code"] == "overloaded"
        assert reply.headers["retry-after"] == "5"
        for connection in slow:
            connection.settimeout(WAIT_S)
            assert status(connection.recv(65536)) == 408
            connection.close()
        assert served.send("POST", API, BODY).status == 200


def test_a_body_that_drips_is_not_waited_for(served: Served):
    """However regularly: it may take its time and what its size needs, no more."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_S) as connection:
        connection.sendall(head(API, "Content-Length: 60000", method="POST"))
        start, found = time.monotonic(), b""
        connection.settimeout(0.1)
        while not found and time.monotonic() - start < WAIT_S:
            with suppress(ConnectionError):
                connection.sendall(b" ")
            with suppress(TimeoutError):
                found = connection.recv(65536)
        assert status(found) == 408


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 4", "Transfer-Encoding: chunked"],
        ["Content-Length: 4", "Content-Length: 5"],
        ["Content-Length: -1"],
        ["Content-Length: +4"],
        ["Content-Length: 0x4"],
        ["Transfer-Encoding: chunked, chunked"],
        ["Transfer-Encoding : chunked"],
        [" folded: header"],
        ["Bad\x00Name: x"],
    ],
)
def test_requests_that_could_be_read_in_two_ways_are_refused(served: Served, lines):
    answer = raw(served, head(API, *lines, method="POST") + b"0\r\n\r\n", wait_s=3.0)
    assert status(answer) in (0, 400, 403, 408, 501), answer[:80]


def test_a_request_may_be_cut_anywhere(served: Served):
    data = json.dumps(BODY).encode()
    whole = head(API, f"Content-Length: {len(data)}", method="POST") + data
    for cut in range(0, len(whole), 7):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(whole[:cut])
    assert status(raw(served, whole)) == 200


def test_unknown_routes_and_methods_are_errors_in_json(served: Served):
    for method, path, expected in (
        ("GET", "/nope", 404), ("GET", "/v1/embeddings", 404), ("GET", API, 405),
        ("DELETE", "/v1/models", 405), ("PUT", "/health", 405),
    ):  # fmt: skip
        reply = served.send(method, path)
        assert reply.status == expected and reply.json["error"]["message"]
    wrong = served.post("/v1/messages", max_tokens=0)
    assert wrong.json["type"] == "error" and wrong.json["error"]["type"] == "invalid_request_error"


def test_a_thousand_leave_and_nothing_is_left(served: Served):
    data = json.dumps({**BODY, "max_tokens": 200, "stream": True}).encode()
    request = head(API, f"Content-Length: {len(data)}", method="POST") + data
    desk = served.service.desk

    def leave(wait: int) -> None:
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(request)
            if wait % 3:
                connection.recv(1 + wait % 50)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(300)))
    end = time.monotonic() + WAIT_S
    while desk.live and time.monotonic() < end:
        time.sleep(0.01)
    assert desk.live == 0
    assert served.send("POST", API, BODY).status == 200


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("127.0.0.1", False), ("127.8.8.8", False), ("::1", False), ("localhost", False),
        ("0.0.0.0", True), ("::", True), ("192.168.1.2", True), ("myhost", True), ("", True),
    ],
)  # fmt: skip
def test_nobody_is_open_to_the_world_by_accident(host, public, halfbyte):
    settings = Settings(host=host)
    assert settings.is_public == public
    if public:
        with pytest.raises(InvalidInputError, match="--api-key-file"):
            require_a_key(settings, insecure=False)
        outcome = halfbyte("serve", "demo", "--host", host)
        assert outcome.code == 2 and "without a key" in outcome.err
    require_a_key(settings, insecure=True)
    require_a_key(Settings(host=host, keys=("k",)), insecure=False)


def test_a_key_file_without_keys_is_refused(halfbyte, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none\n\n")
    outcome = halfbyte("serve", "demo", "--api-key-file", file)
    assert outcome.code == 2 and "no key in it" in outcome.err


def test_a_model_that_is_not_there_ends_the_server(halfbyte, tmp_path):
    outcome = halfbyte("serve", tmp_path / "missing.gguf", "--port", 0)
    assert outcome.code != 0 and "missing.gguf" in outcome.err
