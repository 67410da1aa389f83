"""How answers leave: one JSON document, or server-sent events; either way a client that leaves ends its request at once.

Starlette notices a lost client only when it writes, and a request may wait long for its first token, so both forms here listen for the
disconnect beside the work. An error before the first event is a status; after it, an event {"error": ...} that ends the stream.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lilliput.serve.openai.errors import ApiError

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]
DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str = "") -> bytes:
    """One server-sent event."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n".encode("utf-8", "replace") if name else f"data: {text}\n\n".encode("utf-8", "replace")


class GoneError(Exception):
    """The client has left."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels it and raises GoneError when the client leaves first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise GoneError
        return task.result()
    finally:
        await _end(task, gone)


async def until_left(writing: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Write an answer; it is ended when the client leaves first."""
    writer, gone = asyncio.create_task(writing), asyncio.create_task(left(receive))
    try:
        await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if writer.done() and not writer.cancelled():
            writer.result()
    finally:
        await _end(writer, gone)


class EventStream(Response):
    """Server-sent events out of a generator that is closed as soon as the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: Events) -> None:
        """`events`: whole events as bytes."""
        super().__init__(None, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; ASGI's entry."""
        try:
            await until_left(self._write(send), receive)
        finally:
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": event(error.body()) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def left(receive: Receive) -> None:
    """Until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any] | Awaitable[Any]) -> None:
    for task in tasks:
        if isinstance(task, asyncio.Task):
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
