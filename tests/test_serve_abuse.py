"""What servers of models have been attacked with, at full size, against the command as a process.

After each attack it answers as before, nothing is held, and its memory is where it was. The smaller
twins of these tests, in this process and of every run, are those of `test_serve_guard`.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from served import WAIT_S, commanded

pytestmark = pytest.mark.slow
MIB = 2**20
API = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
MOST_MIB = 24  # that an attack may take while it lasts


@dataclass(frozen=True)
class Target:
    """A server under attack."""

    pid: int
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)

    def metric(self, name: str) -> float:
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=WAIT_S) as reply:
            found = re.search(rf"^halfbyte_{name} (\S+)$", reply.read().decode(), re.MULTILINE)
        assert found is not None
        return float(found[1])

    def memory(self, name: str) -> float:
        """MiB: VmRSS now, VmHWM at most since `forget_peak`."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) / 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with commanded("--context", 256, "--threads", 1, "--parallel", 4) as command:
        found = Target(command.process.pid, urlsplit(command.url).port or 0)
        for _ in range(40):  # so that what is allocated once has been
            assert status(send(found, post(BODY))) == 200
        yield found


@contextmanager
def unharmed(target: Target, most_mib: float = MOST_MIB) -> Iterator[None]:
    """Afterwards it answers, holds nothing, and has not grown."""
    target.forget_peak()
    before = target.memory("VmRSS")
    yield
    assert status(send(target, post(BODY))) == 200
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    assert until(lambda: not any(target.metric(name) for name in names))
    grown, peak = target.memory("VmRSS") - before, target.memory("VmHWM") - before
    print(f"{grown:+.1f} MiB, at most {peak:+.1f} MiB")
    assert peak < most_mib and grown < most_mib / 2


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def post(body: object, path: str = API) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(path, f"Content-Length: {len(data)}", "Connection: close") + data


def send(target: Target, first: bytes, more: Iterable[bytes] = ()) -> bytes:
    """What comes back for these bytes, until the server closes; sends on while it takes them."""
    found = b""
    with target.connect() as connection, suppress(ConnectionError, TimeoutError):
        with suppress(ConnectionError):
            for part in chain([first], more):
                connection.sendall(part)
        while answer := connection.recv(65536):
            found += answer
    return found


def status(answer: bytes) -> int:
    """0: it was closed without an answer."""
    return int(answer.split()[1]) if answer else 0


def test_a_head_of_fifty_megabytes(target: Target):
    with unharmed(target):
        begun = head("/health", method="GET")[:-2]
        answer = send(target, begun + b"X-Long: ", (b"x" * 2**16 for _ in range(800)))
        assert status(answer) in (0, 400, 431)
        many = (b"X-Header-%d: %s\r\n" % (number, b"y" * 100) for number in range(500_000))
        assert status(send(target, begun, many)) in (0, 400, 431)


def test_a_body_of_a_gigabyte(target: Target):
    """It is refused after the first mebibyte, announced or not, and kept nowhere."""
    part = b"x" * 2**16
    endless = repeat(b"%x\r\n%s\r\n" % (len(part), part), 2**30 // len(part))
    with unharmed(target):
        assert status(send(target, head(API, "Content-Length: 1073741824"))) == 413
        answer = send(target, head(API, "Transfer-Encoding: chunked"), endless)
        assert status(answer) in (0, 413)


def test_a_body_that_unpacks_to_a_gigabyte(target: Target):
    bomb = gzip.compress(b"0" * 2**29)
    assert len(bomb) < MIB
    with unharmed(target):
        for encoding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
            lines = (f"Content-Length: {len(bomb)}", f"Content-Encoding: {encoding}")
            reply = send(target, head(API, *lines, "Connection: close") + bomb)
            assert status(reply) in (0, 415)


def test_five_hundred_who_dawdle_with_their_heads(target: Target):
    """They keep nobody out, though more than there may be connections."""
    with unharmed(target):
        slow = [target.connect() for _ in range(500)]
        for connection in slow:
            with suppress(ConnectionError):
                connection.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        for _ in range(5):
            start = time.monotonic()
            assert status(send(target, post(BODY))) == 200
            assert time.monotonic() - start < 10
        for connection in slow:
            connection.settimeout(60)
            with suppress(ConnectionError):
                assert connection.recv(10) == b""
            connection.close()


def test_three_hundred_who_dawdle_with_their_bodies(target: Target):
    """Others are told to come back, and after half a minute it is over."""
    with unharmed(target):
        slow = [target.connect() for _ in range(300)]
        for connection in slow:
            with suppress(ConnectionError):
                connection.sendall(head(API, "Content-Length: 1000") + b"{")
        time.sleep(1.0)
        answer = send(target, post(BODY))
        assert status(answer) == 503 and b"retry-after: 5" in answer and b'"overloaded"' in answer
        answers = []
        for connection in slow:
            connection.settimeout(60)
            with suppress(ConnectionError):
                answers.append(status(connection.recv(65536)))
            connection.close()
        assert set(answers) <= {0, 408} and answers.count(408) > 200


def test_requests_cut_anywhere(target: Target):
    chance = random.Random(1)
    whole = post({**BODY, "stream": True, "max_tokens": 20})
    with unharmed(target):
        for _ in range(1000):
            with target.connect() as connection:
                connection.sendall(whole[: chance.randrange(len(whole))])
                if chance.random() < 0.3:
                    connection.shutdown(socket.SHUT_WR)


def test_a_thousand_who_leave(target: Target):
    request = post({**BODY, "max_tokens": 200, "stream": True})

    def leave(number: int) -> None:
        with target.connect() as connection:
            connection.sendall(request)
            if number % 3:
                connection.recv(1 + number % 50)

    with unharmed(target), ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(1000)))


def test_bytes_that_are_no_json(target: Target):
    chance = random.Random(2)
    whole = json.dumps(BODY).encode()
    with unharmed(target):
        for _ in range(500):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            assert status(send(target, post(bytes(data)))) in (200, 400)
        for text in (b"[" * 500_000, b'{"a":' * 150_000, b"\xff\xfe" * 1000, b'"\\ud800"',
                     b"9" * 100_000, b'{"messages": NaN}', b""):  # fmt: skip
            assert status(send(target, post(text))) == 400


def test_lines_that_are_no_request(target: Target):
    chance = random.Random(3)
    whole = post(BODY)
    with unharmed(target):
        for _ in range(500):
            data = bytearray(whole)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(60)] = chance.randrange(256)
            assert status(send(target, bytes(data))) < 500


def test_a_thousand_requests_in_one_go(target: Target):
    one = head("/health", method="GET")
    last = head("/health", "Connection: close", method="GET")
    with unharmed(target):
        answer = send(target, one * 999 + last)
        assert answer.count(b"HTTP/1.1 200") == 1000


def test_connections_that_do_nothing(target: Target):
    with unharmed(target):
        idle = [target.connect() for _ in range(400)]
        assert status(send(target, post(BODY))) == 200
        for connection in idle:
            connection.close()
