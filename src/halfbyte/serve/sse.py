"""Server-sent events as an ASGI response: own bytes, comments while idle, an end when nobody reads.

A client that leaves is noticed at once, and whatever made the frames is closed, or told that it
need not begin.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress

from starlette.types import Receive, Scope, Send

PING = b": ping\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class EventStream:
    """Sends frames as they come, and a comment after every `ping_s` without one.

    `left` is called at the end, also where no frame was ever asked for.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes],
        *,
        ping_s: float,
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self._frames = frames
        self._ping_s = ping_s
        self._left = left

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = asyncio.ensure_future(departure(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
            await self._send(left, send)
        except OSError:  # the connection broke while something was sent
            pass
        finally:
            left.cancel()
            await self._frames.aclose()
            self._left()

    async def _send(self, left: asyncio.Future[None], send: Send) -> None:
        coming: asyncio.Future[bytes] | None = None
        try:
            while not left.done():
                coming = coming or asyncio.ensure_future(anext(self._frames))
                await asyncio.wait(
                    {coming, left}, timeout=self._ping_s, return_when=asyncio.FIRST_COMPLETED
                )
                if left.done():
                    return
                frame = PING
                if coming.done():
                    frame, coming = coming.result(), None
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except StopAsyncIteration:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if coming is not None and not coming.done():
                coming.cancel()
                with suppress(asyncio.CancelledError, StopAsyncIteration):
                    await coming


async def departure(receive: Receive) -> None:
    """Returns when the client has left. The body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
