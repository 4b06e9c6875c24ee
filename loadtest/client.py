"""A small HTTP client for measuring: what it does per token is a few microseconds, because it shares two cores.

Streams are not parsed while they come: events are counted, their times noted, and only the last one is read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

# the server closes idle connections after five seconds; ours go before
IDLE_SECONDS = 3.0
_KEPT = 8192


@dataclass(slots=True)
class Answer:
    """One request and what came of it. Times are seconds of the monotonic clock; 0 if it never came so far.

    ``due`` is when a person would have sent it. ``status`` is 0 without an answer; ``cut`` says that a stream ended
    without its final event, ``code`` is the error's. ``queue``, ``load`` and ``first_token`` are the worker's timings.
    """

    kind: str
    tenant: str
    group: str
    due: float
    asked: int = 0
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    end: float = 0.0
    longest_gap: float = 0.0
    status: int = 0
    code: str = ""
    events: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    version: int = -1
    blocks: int = 0
    queue: float = 0.0
    load: float = 0.0
    first_token: float = 0.0
    streamed: bool = False
    cut: bool = False
    hung_up: bool = False

    @property
    def good(self) -> bool:
        """Whether it was answered, wholly and without an error."""
        return self.status == 200 and not self.code and not self.cut and not self.hung_up

    @property
    def per_token(self) -> float:
        """Seconds from one token to the next, on average; 0 if there is no second one."""
        return (self.last - self.first) / (self.tokens - 1) if self.streamed and self.tokens > 1 else 0.0


class _Exchange:
    """One request on one connection; httptools calls the methods that begin with ``on_``."""

    def __init__(self, answer: Answer, hang_up: int) -> None:
        self.answer, self.hang_up = answer, hang_up
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.body = bytearray()
        self.stream = False
        self.keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.stream = value.startswith(b"text/event-stream")

    def on_headers_complete(self) -> None:
        self.answer.status = self.parser.get_status_code()
        self.answer.streamed = self.stream

    def on_body(self, data: bytes) -> None:
        body, answer = self.body, self.answer
        body += data
        if not self.stream:
            return
        # a comment is no piece of the answer; an event that was split ends in the next call
        events = data.count(b"}\n\n")
        if events:
            now = time.monotonic()
            if answer.first:
                answer.longest_gap = max(answer.longest_gap, now - answer.last)
            else:
                answer.first = now
            answer.last = now
            answer.events += events
        if len(body) > 2 * _KEPT:
            del body[:-_KEPT]

    def on_message_complete(self) -> None:
        self.keep = self.parser.should_keep_alive()
        if not self.done.done():
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: _Exchange | None = None
        self.idle_since = 0.0
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio's class
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        try:
            exchange.parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not exchange.done.done():
                exchange.done.set_exception(ConnectionError(str(error)))
        if exchange.hang_up and exchange.answer.events >= exchange.hang_up and not exchange.done.done():
            # the connection is closed with the exchange
            exchange.answer.hung_up = True
            exchange.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.exchange is not None and not self.exchange.done.done():
            self.exchange.done.set_exception(ConnectionError("the server closed the connection"))

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()
        self.lost = True


class Client:
    """Sends requests to one server, each on a connection of its own while it lasts. Use as a context manager.

    ``answers`` holds every request to /generate and /update, in the order in which they were sent.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: deque[_Connection] = deque()
        self.answers: list[Answer] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection in self._idle:
            connection.close()

    async def ask(
        self,
        kind: str,
        tenant: str,
        body: dict[str, Any],
        *,
        due: float | None = None,
        group: str = "",
        hang_up: int = 0,
        patience: float = 180.0,
    ) -> Answer:
        """POST /generate or /update. Never raises for what the server does: the answer says it."""
        answer = Answer(kind, tenant, group, time.monotonic() if due is None else due)
        answer.asked = body.get("max_tokens", 0)
        self.answers.append(answer)
        payload = json.dumps({"tenant": tenant, **body}).encode()
        exchange = await self._exchange("POST", f"/{kind}", payload, answer, hang_up, patience)
        answer.end = time.monotonic()
        if exchange is not None:
            _read(answer, exchange)
        return answer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body; status 0 if nothing came."""
        answer = Answer(path, "", "", time.monotonic())
        exchange = await self._exchange("GET", path, b"", answer, 0, 30.0)
        return answer.status, b"" if exchange is None else bytes(exchange.body)

    async def _exchange(
        self, method: str, path: str, payload: bytes, answer: Answer, hang_up: int, patience: float
    ) -> _Exchange | None:
        try:
            async with asyncio.timeout(patience):
                connection = await self._connection()
                connection.exchange = exchange = _Exchange(answer, hang_up)
                head = (
                    f"{method} {path} HTTP/1.1\r\nhost: {self._host}:{self._port}\r\n"
                    f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
                )
                assert connection.transport is not None
                try:
                    answer.sent = time.monotonic()
                    connection.transport.write(head.encode() + payload)
                    await exchange.done
                except BaseException:
                    connection.close()
                    raise
        except (OSError, TimeoutError) as error:
            if answer.status:
                answer.cut = True
            answer.code = "timeout" if isinstance(error, TimeoutError) else "connection"
            return None
        connection.exchange = None
        if exchange.keep and not connection.lost:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.close()
        return exchange

    async def _connection(self) -> _Connection:
        oldest = time.monotonic() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and connection.idle_since > oldest:
                return connection
            connection.close()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        return connection


def _read(answer: Answer, exchange: _Exchange) -> None:
    """Takes from the body what the answer says about itself."""
    if answer.hung_up:
        answer.tokens = answer.events
        return
    body = bytes(exchange.body)
    if answer.streamed:
        told, finished = _final_event(body)
        answer.cut = not finished
    else:
        told = _parsed(body)
        # without a stream the whole text is the first piece
        answer.first = answer.last = answer.end
    if error := told.get("error"):
        answer.code = str(error.get("code") or "error")
        return
    if answer.status != 200:
        answer.code = str(answer.status)
        return
    usage, timings = told.get("usage") or {}, told.get("timings") or {}
    answer.tokens = usage.get("completion_tokens", answer.events)
    answer.prompt_tokens = usage.get("prompt_tokens", 0)
    answer.version = told.get("memory_version", -1)
    answer.blocks = told.get("blocks", 0)
    answer.queue, answer.load = timings.get("queue", 0.0), timings.get("load", 0.0)
    answer.first_token = timings.get("first_token", 0.0)


def _final_event(body: bytes) -> tuple[dict[str, Any], bool]:
    """The last event with JSON in it, and whether the stream came to its end: that event, or an error."""
    ended = False
    for event in reversed(body.split(b"\n\n")):
        data = event.partition(b"data: ")[2]
        if data == b"[DONE]":
            ended = True
        elif data:
            told = _parsed(data)
            return told, (ended and "finish_reason" in told) or "error" in told or "blocks" in told
    return {}, False


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
