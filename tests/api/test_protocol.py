"""When a request came in, however long those before it keep the loop; and what becomes of requests that do not end."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, ClassVar

import pytest
import uvicorn

import app.api.protocol
from app.api.protocol import HEADERS_SECONDS, MOST_BYTES, REST_SECONDS, Protocol
from app.api.server import listen
from app.errors import ServiceError
from tests.api.conftest import Service, until

pytestmark = pytest.mark.anyio

Skip = Callable[[float], Awaitable[None]]
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def serving(application: Any) -> AsyncIterator[tuple[str, int]]:
    listener = listen("127.0.0.1", 0)
    config = uvicorn.Config(application, http=Counting, lifespan="off", ws="none", log_config=None)
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    try:
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        await task


class Echo:
    """Answers with the length of the body; ``/early`` before it has come, ``/late`` when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.ended: list[str] = []
        self.asked: list[tuple[str, str]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append((scope["method"], scope["path"]))
        taken, more = 0, scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended.append(scope["path"])
                return
            taken += len(message["body"])
            more = message["more_body"]
        if scope["path"] == "/late":
            await self.go.wait()
        headers = [(b"content-length", str(len(str(taken))).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": str(taken).encode()})


class Counting(Protocol):
    """Knows how much has come on each connection, by the client's address."""

    taken: ClassVar[Counter[Any]] = Counter()
    told: ClassVar[dict[str, str]] = {}

    @staticmethod
    def refused(error: ServiceError, request_id: str) -> None:
        Counting.told[request_id] = error.code

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.taken[self.client] = 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.taken[self.client] += len(data)


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._sent, self._name = 0, writer.get_extra_info("sockname")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        self._sent += len(data)
        await self.writer.drain()

    async def arrive(self, data: bytes = b"") -> None:
        """Sends it, and waits until it is there."""
        await self.send(data)
        await until(lambda: Counting.taken.get(self._name) == self._sent)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(20):
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = dict(line.split(": ", 1) for line in lines)
            return (
                int(status.split()[1]),
                headers,
                await self.reader.readexactly(int(headers["content-length"])),
            )

    async def check_refused(self, status: int, code: str) -> None:
        told, headers, body = await self.answer()
        error = json.loads(body)
        assert (told, error["error"]["code"], headers["connection"]) == (status, code, "close")
        assert headers["content-type"] == "application/json"
        assert headers["x-request-id"] == error["request_id"]
        assert set(error["error"]) == {"message", "type", "code", "param"}
        assert Counting.told.pop(error["request_id"]) == code
        await self.check_closed()

    async def check_closed(self) -> None:
        async with asyncio.timeout(20):
            assert await self.reader.read() == b""


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def connect(echo: Echo) -> AsyncIterator[Callable[[], Awaitable[Client]]]:
    clients: list[Client] = []
    async with serving(echo) as address:

        async def connect() -> Client:
            clients.append(Client(*await asyncio.open_connection(*address)))
            return clients[-1]

        yield connect
        # a server waits for what is at work in it
        echo.go.set()
        for client in clients:
            client.writer.close()


Connect = Callable[[], Awaitable[Client]]


async def test_requests_that_come_together_began_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    began: list[float] = []
    monkeypatch.setattr(app.api.protocol.time, "perf_counter", lambda: now)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal now
        began.append(scope["began"])
        # as if it had kept the loop for a second
        now += 1.0
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async with serving(application) as address:
        connections = [await asyncio.open_connection(*address) for _ in range(3)]
        await asyncio.sleep(0.05)
        for _, writer in connections:
            writer.write(REQUEST)
        for reader, writer in connections:
            assert b"204" in await reader.readline()
            writer.close()
    assert began == [0.0, 0.0, 0.0]


# ---------------------------------------------------------------- too large


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /", b"x" * 1000),
        (b"GET / HTTP/1.1\r\n", b"x" * 1000),
        (b"GET / HTTP/1.1\r\nx: ", b"x" * 1000),
        (b"GET / HTTP/1.1\r\n", b"x: y\r\n" * 200),
        (b"", b"\r\n" * 500),
    ],
    ids=["line", "name", "value", "many", "empty lines"],
)
async def test_headers_without_end(connect: Connect, begin: bytes, piece: bytes) -> None:
    for first in (b"", REQUEST):
        client = await connect()
        await client.send(first)
        if first:
            assert (await client.answer())[0] == 200
        await client.send(begin)
        for _ in range(MOST_BYTES // len(piece)):
            await client.send(piece)
            await asyncio.sleep(0)
        await client.send(piece)
        await client.check_refused(431, "headers_too_large")


@pytest.mark.parametrize("begin", [b"GET /", b"GET / HTTP/1.1\r\nx: "], ids=["line", "value"])
async def test_headers_in_one_piece(connect: Connect, begin: bytes) -> None:
    end = b" HTTP/1.1\r\nhost: x\r\n\r\n" if begin == b"GET /" else b"\r\n\r\n"
    client = await connect()
    await client.send(begin + b"x" * (MOST_BYTES - 1000) + end)
    assert (await client.answer())[0] == 200
    await client.send(begin + b"x" * MOST_BYTES + end)
    await client.check_refused(431, "headers_too_large")


async def test_trailers_without_end(connect: Connect, echo: Echo) -> None:
    client = await connect()
    await client.send(CHUNKED + b"5\r\nhello\r\n0\r\nx: ")
    # whoever goes on sending may not hear why it is closed
    with suppress(ConnectionError):
        for _ in range(1000):
            await client.send(b"x" * 1000)
            await asyncio.sleep(0)
    await until(lambda: echo.ended == ["/"])


async def test_bodies_may_be_large_and_requests_many(connect: Connect) -> None:
    client = await connect()
    size = 3 * MOST_BYTES
    plain = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)
    # in the smallest pieces more of it is around the body than in it
    pieces = CHUNKED + b"1\r\nx\r\n" * (MOST_BYTES // 4) + b"0\r\nchecksum: y\r\n\r\n"
    for _ in range(2):
        await client.send(plain + pieces + REQUEST * 20)
        assert (await client.answer())[2] == str(size).encode()
        assert (await client.answer())[2] == str(MOST_BYTES // 4).encode()
        assert [(await client.answer())[0] for _ in range(20)] == [200] * 20


# ---------------------------------------------------------------- no HTTP


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET x:y:z HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        CHUNKED + b"x\r\n",
    ],
    ids=["nonsense", "header", "url", "length", "chunk"],
)
async def test_what_is_no_http(connect: Connect, sent: bytes) -> None:
    for first in (b"", REQUEST):
        client = await connect()
        await client.send(first)
        if first:
            assert (await client.answer())[0] == 200
        await client.send(sent)
        await client.check_refused(400, "malformed_request")


async def test_an_answer_is_not_taken_for_that_of_the_request_before(connect: Connect, echo: Echo) -> None:
    client = await connect()
    await client.send(REQUEST.replace(b"/ ", b"/late ") + b"nonsense\r\n\r\n")
    await client.check_closed()
    echo.go.set()
    # nor does a body's error come behind its answer
    client = await connect()
    await client.send(CHUNKED.replace(b"/ ", b"/early "))
    assert (await client.answer())[0] == 200
    await client.send(b"x\r\n")
    await client.check_closed()


async def test_whoever_waits_for_a_body_is_told_that_it_is_none(connect: Connect, echo: Echo) -> None:
    client = await connect()
    await client.send(CHUNKED + b"5\r\nhello\r\n")
    await client.send(b"x\r\n")
    await client.check_refused(400, "malformed_request")
    await until(lambda: echo.ended == ["/"])


# ---------------------------------------------------------------- too slow


async def test_headers_that_do_not_end_in_time(connect: Connect, pass_time: Skip) -> None:
    silent, slow, again, blank = [await connect() for _ in range(4)]
    await silent.arrive()
    await again.arrive(REQUEST)
    assert (await again.answer())[0] == 200
    for client in (slow, again):
        await client.arrive(b"GET / HTTP/1.1\r\n")
    await blank.arrive(b"\r\n")
    await pass_time(HEADERS_SECONDS / 2)
    for client in (slow, again):
        await client.arrive(b"x: y\r\n")
    await blank.arrive(b"\r\n")
    await pass_time(HEADERS_SECONDS / 2 + 1)
    await silent.check_closed()
    for client in (slow, again, blank):
        await client.check_refused(408, "request_too_slow")


async def test_slow_headers_that_end_in_time(connect: Connect, pass_time: Skip) -> None:
    client = await connect()
    for _ in range(3):
        await pass_time(3.0)
        await client.arrive(REQUEST[:-2])
        await pass_time(HEADERS_SECONDS / 2)
        await client.arrive(REQUEST[-2:])
        assert (await client.answer())[0] == 200


async def test_one_who_waits_for_an_answer_may_have_begun_the_next_request(
    connect: Connect, echo: Echo, pass_time: Skip
) -> None:
    client = await connect()
    late = REQUEST.replace(b"/ ", b"/late ")
    await client.arrive(late + REQUEST[:10])
    for _ in range(5):
        await pass_time(HEADERS_SECONDS)
    echo.go.set()
    assert (await client.answer())[0] == 200
    await client.arrive(REQUEST[10:])
    assert (await client.answer())[0] == 200


async def test_the_rest_of_a_body_is_not_waited_for_for_ever(connect: Connect, pass_time: Skip) -> None:
    client = await connect()
    await client.arrive(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
    assert (await client.answer())[0] == 200
    for _ in range(int(REST_SECONDS / 4)):
        await client.arrive(b"x")
        await pass_time(4.0)
    await pass_time(1.0)
    await client.check_closed()
    # one that does come is no fault
    client = await connect()
    await client.arrive(b"POST /early HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\nx")
    assert (await client.answer())[0] == 200
    await pass_time(4.0)
    await client.arrive(b"xx" + REQUEST)
    assert (await client.answer())[0] == 200


# ---------------------------------------------------------------- asked for another protocol

# as Java's HTTP client asks for HTTP/2 where there is no TLS, and curl --http2
H2C = b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
# a body, never a request
INNER = b"POST /inner HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"
BODIES = {
    "length": b"content-length: %d\r\n\r\n%b" % (len(INNER), INNER),
    "chunked": b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\nchecksum: y\r\n\r\n"
    % (len(INNER), INNER),
}


def upgrading(body: bytes, more: bytes = H2C, version: bytes = b"1.1") -> bytes:
    """A POST with headers that ask for another protocol; ``body`` begins with the headers that announce it."""
    return b"POST /outer HTTP/%b\r\nhost: x\r\n%b%b" % (version, more, body)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_a_body_is_read_whatever_protocol_is_asked_for(
    connect: Connect, echo: Echo, body: bytes
) -> None:
    request = upgrading(body)
    head = request.index(b"\r\n\r\n") + 4
    client = await connect()
    # all at once; the body later; cut in the headers; in the body; two in one piece, with one of another kind between
    for pieces in (
        [request],
        [request[:head], request[head:]],
        [request[:50], request[50:]],
        [request[: head + 20], request[head + 20 :]],
        [request + REQUEST + request],
        [request[i : i + 1] for i in range(len(request))],
    ):
        echo.asked = []
        for piece in pieces:
            await client.arrive(piece)
        assert (await client.answer())[2] == str(len(INNER)).encode()
        if b"".join(pieces) != request:
            assert (await client.answer())[2] == b"0"
            assert (await client.answer())[2] == str(len(INNER)).encode()
        # the connection is still one that speaks HTTP/1.1
        await client.arrive(REQUEST)
        assert (await client.answer())[2] == b"0"
        assert ("POST", "/inner") not in echo.asked
        assert echo.asked[-1] == ("GET", "/")


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
async def test_the_connection_is_kept_or_closed_as_was_asked_besides(connect: Connect, body: bytes) -> None:
    for more, version in (
        (b"connection: upgrade, close\r\nupgrade: h2c\r\n", b"1.1"),
        (b"connection: upgrade\r\nupgrade: h2c\r\n", b"1.0"),
    ):
        client = await connect()
        await client.send(upgrading(body, more, version))
        _, headers, told = await client.answer()
        assert (told, headers["connection"]) == (str(len(INNER)).encode(), "close")
        await client.check_closed()


async def test_no_body_and_other_protocols(connect: Connect, echo: Echo) -> None:
    client = await connect()
    for name in (b"h2c", b"websocket", b"TLS/1.0, foo/2"):
        ask = b"GET /ws HTTP/1.1\r\nhost: x\r\nupgrade: %b\r\nconnection: upgrade\r\n\r\n" % name
        await client.send(ask + ask)
        assert [(await client.answer())[2] for _ in range(2)] == [b"0", b"0"]
    assert echo.asked == [("GET", "/ws")] * 6


async def test_it_began_when_its_first_byte_came(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    began: list[float] = []
    monkeypatch.setattr(app.api.protocol.time, "perf_counter", lambda: now)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        began.append(scope["began"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    request = upgrading(BODIES["length"])
    async with serving(application) as address:
        client = Client(*await asyncio.open_connection(*address))
        await client.arrive(request[:50])
        now = 7.0
        await client.arrive(request[50:])
        assert (await client.answer())[0] == 200
        client.writer.close()
    assert began == [0.0]


async def test_what_is_asked_for_another_protocol_with_is_bounded_too(
    connect: Connect, pass_time: Skip
) -> None:
    client = await connect()
    await client.send(upgrading(b"x: %b\r\ncontent-length: 1\r\n\r\nx" % bytes(b"y" * MOST_BYTES)))
    await client.check_refused(431, "headers_too_large")
    # a body that does not come, behind an answer
    client = await connect()
    await client.arrive(upgrading(b"content-length: 9\r\n\r\n").replace(b"/outer", b"/early"))
    assert (await client.answer())[0] == 200
    await client.arrive(b"x")
    await pass_time(REST_SECONDS + 1)
    await client.check_closed()


@pytest.mark.parametrize(
    "end",
    [
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"transfer-encoding: gzip\r\n\r\nhello",
        b"transfer-encoding: chunked\r\n\r\nx\r\n",
    ],
    ids=["both", "two lengths", "not chunked", "chunk"],
)
async def test_a_body_without_a_clear_end_is_refused_as_ever(connect: Connect, end: bytes) -> None:
    client = await connect()
    await client.send(upgrading(end))
    await client.check_refused(400, "malformed_request")


@pytest.mark.parametrize("where", [b"x:443", b"/"])
async def test_it_is_no_proxy(connect: Connect, echo: Echo, where: bytes) -> None:
    client = await connect()
    await client.send(b"CONNECT %b HTTP/1.1\r\nhost: x\r\n\r\n" % where + REQUEST)
    await client.check_refused(400, "malformed_request")
    assert echo.asked == []


async def test_the_service_hears_what_is_said(service: Service) -> None:
    body = json.dumps({"tenant": "alice", "prompt": [5, 6, 7], "max_tokens": 2}).encode()
    head = b"POST /generate HTTP/1.1\r\nhost: localhost\r\n%bcontent-type: application/json\r\n" % H2C
    async with serving(service.app) as address:
        client = Client(*await asyncio.open_connection(*address))
        for announced in (
            b"content-length: %d\r\n\r\n" % len(body) + body,
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body),
        ):
            await client.send(head + announced)
            status, _, told = await client.answer()
            assert status == 200, told
            assert json.loads(told)["usage"]["completion_tokens"] == 2
        await client.send(head + b"content-length: %d\r\n\r\n" % (service.settings.max_body_bytes + 1))
        assert (await client.answer())[0] == 413
        client.writer.close()
