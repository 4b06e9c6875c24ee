"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import structlog
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from app.api.errors import error_body, note
from app.api.stream import ClientGone, Part, Stream
from app.errors import ServiceError
from app.messages import Tokens, UpdateProgress

log = structlog.get_logger("api")

# proxies close connections that are silent for a minute
KEEP_ALIVE_SECONDS = 15.0
# an error within this time still becomes a status of its own; later it becomes an event
FIRST_ANSWER_SECONDS = 5.0
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


def event(data: BaseModel | dict[str, object], name: str | None = None) -> bytes:
    """One event. JSON has no raw line breaks, so one data line is enough."""
    if isinstance(data, BaseModel):
        body = data.model_dump_json(exclude_none=True)
    else:
        body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {body}\n\n".encode()


@asynccontextmanager
async def watched(request: Request, stream: Stream) -> AsyncIterator[None]:
    """While inside, a client that closes its connection ends ``stream`` with ClientGone."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stream.client_gone()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()


class EventStream(Response):
    """Sends ``events``, chunks of an event stream.

    A ServiceError before the first chunk is answered as any other error, with its status; later it becomes an
    ``error`` event. The generator is closed in every case, and with it the contexts it holds open. A client that takes
    nothing for ``stream_stall_timeout`` seconds is cut off. FastAPI's own event streams know neither.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = scope["app"].state.services.settings.stream_stall_timeout

        async def put(chunk: bytes, more: bool = True) -> None:
            async with asyncio.timeout(seconds):
                await send(_body(chunk, more))

        async with aclosing(self._events) as events:
            first = await anext(events)
            head: Message = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
            try:
                await put(first)
                try:
                    async for chunk in events:
                        await put(chunk)
                except ServiceError as error:
                    note(scope, error)
                    await put(event(error_body(error, scope["request_id"]), "error"))
                except ClientGone:
                    return
                await put(b"", more=False)
            except TimeoutError:
                log.info(
                    "stream cut off: its client does not read",
                    request_id=scope["request_id"],
                    seconds=seconds,
                )
                if "abort" in scope:
                    scope["abort"]()


def _body(chunk: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


async def parts(stream: Stream) -> AsyncGenerator[Part | None]:
    """The answers of ``stream`` up to the final one; None for each stretch of silence, for a comment.

    The first None comes soon, so that the response can begin.
    """
    silence = FIRST_ANSWER_SECONDS
    part: Part | None = None
    while part is None or isinstance(part, Tokens | UpdateProgress):
        try:
            async with asyncio.timeout(silence):
                part = await stream.next()
        except TimeoutError:
            part = None
        silence = KEEP_ALIVE_SECONDS
        yield part
