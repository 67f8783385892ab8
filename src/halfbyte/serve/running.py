"""A server from its first connection to its last: uvicorn with h11, and how it ends.

h11 bounds the head of a request, which the faster parser does not. A connection that does not get
its head across in time is closed, and at once where there are too many: those who dawdle keep
nobody out. The first SIGTERM or Ctrl-C lets nobody in any more and waits for those who are in; the
second ends at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import FrameType
from typing import cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from halfbyte.serve.app import application
from halfbyte.serve.service import Make, Service
from halfbyte.serve.settings import MAX_HEADER_BYTES

HEAD_S = 20.0
IDLE_S = 5
LINGER_S = 1.0
LAST_FRAMES_S = 2.0

Talk = Callable[[str], None]


def run(service: Service, make: Make, talk: Talk) -> None:
    """Serves until it is told to stop; `make` loads the model meanwhile.

    Raises what loading raised.
    """
    asyncio.run(Server(configured(service), service, make, talk).serve())
    if service.error is not None:
        raise service.error


def configured(service: Service) -> uvicorn.Config:
    """How uvicorn is to serve it."""
    settings = service.settings
    return uvicorn.Config(
        application(service),
        host=settings.host,
        port=settings.port,
        http=Impatient,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=settings.connections,
        backlog=256,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )


class Impatient(H11Protocol):
    """Closes a connection that has not sent the head of its first request in time.

    Beyond the bound of connections the one that has had nothing to do for longest goes, for the
    newest. Where all are being answered nobody goes: the guard says 503 then.
    """

    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's own answer is no JSON, and hits whoever asks next.
        most, self.limit_concurrency = self.limit_concurrency, None
        self._since = self.loop.time()
        self.loop.call_later(HEAD_S, self._hurry)
        if most is not None and len(self.connections) > most:
            self._make_room()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        if self.conn.their_state is h11.SEND_BODY:
            # Refused before its body was there: the rest is not read, and whoever sends on may
            # still read the answer before the door shuts.
            self.transport.pause_reading()
            self.loop.call_later(LINGER_S, self.transport.close)
            return
        super().on_response_complete()

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer here."""
        closing = self.transport.is_closing()
        return not closing and (not self.cycle or self.cycle.response_complete)

    def _make_room(self) -> None:
        others = [cast(Impatient, it) for it in self.connections if it is not self]
        idle = [it for it in others if it.idle]
        if idle:
            min(idle, key=lambda it: it._since).transport.abort()

    def _hurry(self) -> None:
        if not self.scope and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, with our end."""

    def __init__(self, config: uvicorn.Config, service: Service, make: Make, talk: Talk) -> None:
        super().__init__(config)
        self._service = service
        self._make = make
        self._talk = talk
        self._ending: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._service.load(self._make, self._loaded)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if self._ending is not None or self._loop is None:
            self._service.close()
            self.should_exit = self.force_exit = True
            return
        self._ending = self._loop.create_task(self._end())

    async def _end(self) -> None:
        service = self._service
        live = service.state == "ready" and service.desk.live
        if live:
            self._talk(f"stopping: {live} requests may finish ({service.settings.drain_s:.0f} s)")
        if not await service.drain():
            self._talk("the others are ended")
            await asyncio.to_thread(service.close)
            await asyncio.sleep(LAST_FRAMES_S / 10)
        service.close()
        self.should_exit = True

    def _port(self) -> int:
        """Where it listens; of port 0 the one that was free."""
        return self.servers[0].sockets[0].getsockname()[1]

    def _loaded(self) -> None:
        if self._service.error is not None:
            self.should_exit = True
            return
        llm, settings = self._service.llm, self._service.settings
        for note in llm.notes:
            self._talk(note)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{self._port()}"
        self._talk(
            f"{self._service.name}: {self._service.parallel} at once, "
            f"{llm.context} tokens each, {llm.decoder.name} ops"
        )
        self._talk(f"{address}/v1 for clients" + (f", {address} to look" if settings.page else ""))
