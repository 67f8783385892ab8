"""A server in this process, on a real socket of this machine, and a client that reads raw bytes."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from halfbyte.formats.reference import DEMO
from halfbyte.llm import LLM
from halfbyte.serve.running import Server, configured
from halfbyte.serve.service import Service
from halfbyte.serve.settings import Settings

WAIT_S = 180.0  # a bound for a machine under load, not a measure


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.json["choices"][0]["message"]["content"]

    @property
    def frames(self) -> list[Any]:
        """The data of every event; comments are left out, and [DONE] is a string."""
        return [data for _, data in self.events]

    @property
    def events(self) -> list[tuple[str | None, Any]]:
        """Name and data of every event."""
        found: list[tuple[str | None, Any]] = []
        for block in self.body.decode().split("\n\n"):
            lines = [line for line in block.split("\n") if line and not line.startswith(":")]
            fields = dict(line.split(": ", 1) for line in lines)
            if "data" in fields:
                data = fields["data"]
                value = data if data == "[DONE]" else json.loads(data)
                found.append((fields.get("event"), value))
        return found


class Served:
    """A running server."""

    def __init__(self, service: Service, server: uvicorn.Server) -> None:
        self.service = service
        self.server = server

    @property
    def port(self) -> int:
        return self.server.servers[0].sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        connection = self.connect()
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            return Reply(
                answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
            )
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, headers: dict[str, str] | None = None, /, **body: Any) -> Reply:
        return self.send("POST", path, body, headers)

    def chat(self, *texts: str, **more: Any) -> Reply:
        """A conversation that a user begins."""
        roles = ("user", "assistant")
        messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]
        return self.post("/v1/chat/completions", messages=messages, **more)


@contextmanager
def serving(llm: LLM, name: str = "demo", **settings: Any) -> Iterator[Served]:
    """Serves a model that is loaded; it can be served again afterwards."""
    service = Service(name, Settings(port=0, **settings), parallel=llm.plan.setup.sequences)
    server = Server(configured(service), service, lambda _: llm, lambda _: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    for _ in range(int(WAIT_S * 100)):
        if service.state == "ready":
            break
        threading.Event().wait(0.01)
    assert service.state == "ready", service.error
    try:
        yield Served(service, server)
    finally:
        service.close()
        server.should_exit = True
        thread.join(WAIT_S)
        llm.engine.check_integrity()
        llm.engine.forget()
        usage = llm.engine.usage
        assert not usage.pages_held and not usage.running and not usage.waiting, usage


class Command:
    """`halfbyte serve` as a process of its own; `said` is what it told on stderr."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []

    @property
    def url(self) -> str:
        """Waits until it serves."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            found = re.search(r"(http://\S+)/v1 for clients", line)
            if found:
                # Nobody else reads on, and a full pipe would keep the server waiting.
                rest = (self.process.stderr,)
                threading.Thread(target=self.said.extend, args=rest, daemon=True).start()
                return found[1]
        raise AssertionError("".join(self.said))


@contextmanager
def commanded(*flags: object, model: object = DEMO) -> Iterator[Command]:
    """The command with these flags, on a free port; at the end it is told to end, and does."""
    command = [sys.executable, "-m", "halfbyte", "serve", model, "--port", 0, *flags]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Command(process)
        finally:
            process.terminate()
            try:
                process.wait(WAIT_S)
            finally:
                process.kill()
