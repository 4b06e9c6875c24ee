"""The measuring client against a server that answers what a test tells it to, byte by byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from loadtest.arrivals import Lag, open_loop
from loadtest.client import Answer, Client
from loadtest.people import Act, Session

pytestmark = pytest.mark.anyio

STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
FINAL = (
    b'data: {"text":"","finish_reason":"length","usage":{"prompt_tokens":5,"completion_tokens":3},'
    b'"memory_version":4,"timings":{"queue":0.5,"load":0.25,"first_token":1,"total":2}}\n\n'
)
DONE = b"data: [DONE]\n\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def token(word: str) -> bytes:
    return chunk(f'data: {{"text":"{word}"}}\n\n'.encode())


def plain(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


Pieces = list[bytes]


@asynccontextmanager
async def server(
    answer: Callable[[int], Pieces], pause: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0.005)
) -> AsyncIterator[tuple[Client, list[bool]]]:
    """Sends the pieces of each request's answer, a pause behind each; ``b""`` closes. Says which were read whole."""
    whole: list[bool] = []
    connections: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(x[15:]) for x in head.split(b"\r\n") if x.startswith(b"content-length"))
                await reader.readexactly(length)
                number = len(whole)
                whole.append(False)
                for piece in answer(number):
                    if not piece:
                        writer.close()
                        return
                    writer.write(piece)
                    await writer.drain()
                    await pause()
                whole[number] = True
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with Client(f"http://127.0.0.1:{port}") as client:
        yield client, whole
    for connection in connections:
        connection.close()
    listener.close()
    await asyncio.sleep(0.01)


async def ask(*pieces: bytes, hang_up: int = 0, patience: float = 5.0) -> Answer:
    async with server(lambda _: list(pieces)) as (client, _):
        return await client.ask("generate", "t", {"max_tokens": 3}, hang_up=hang_up, patience=patience)


async def test_a_stream() -> None:
    answer = await ask(
        STREAM,
        chunk(b": waiting\n\n"),
        token("a"),
        token("b"),
        token("c") + chunk(FINAL + DONE),
        b"0\r\n\r\n",
    )
    assert answer.good
    assert answer.streamed
    assert (answer.events, answer.tokens, answer.prompt_tokens, answer.version) == (4, 3, 5, 4)
    assert (answer.queue, answer.load, answer.asked) == (0.5, 0.25, 3)
    assert answer.due <= answer.sent < answer.first < answer.last <= answer.end
    assert answer.per_token == pytest.approx((answer.last - answer.first) / 2)
    assert 0 < answer.longest_gap <= answer.last - answer.first


async def test_events_may_be_cut_anywhere() -> None:
    text = STREAM + token("a") + chunk(FINAL + DONE) + b"0\r\n\r\n"
    answer = await ask(*(text[i : i + 40] for i in range(0, len(text), 40)))
    assert answer.good
    assert answer.tokens == 3


async def test_a_long_stream_keeps_its_end() -> None:
    words = b'data: {"text":"word"}\n\n' * 1000
    for whole in (chunk(words) + chunk(FINAL + DONE), chunk(words + FINAL + DONE)):
        answer = await ask(STREAM, whole, b"0\r\n\r\n")
        assert answer.good
        assert answer.events == 1001


async def test_a_stream_that_is_cut() -> None:
    for ending in (b"", b"0\r\n\r\n"):
        answer = await ask(STREAM, token("a"), token("b"), ending)
        assert answer.cut
        assert not answer.good
    answer = await ask(STREAM, token("a"), chunk(FINAL), b"0\r\n\r\n")
    assert answer.cut


async def test_an_error_in_a_stream_is_an_end() -> None:
    error = b'event: error\ndata: {"error":{"message":"m","code":"worker_unavailable"},"request_id":"x"}\n\n'
    answer = await ask(STREAM, token("a"), chunk(error), b"0\r\n\r\n")
    assert not answer.cut
    assert not answer.good
    assert (answer.status, answer.code) == (200, "worker_unavailable")


async def test_refusals_and_silence() -> None:
    answer = await ask(plain(429, b'{"error":{"code":"tenant_queue_full","message":"m"},"request_id":"x"}'))
    assert (answer.status, answer.code, answer.good, answer.cut) == (429, "tenant_queue_full", False, False)
    answer = await ask(b"")
    assert (answer.status, answer.code, answer.good) == (0, "connection", False)
    answer = await ask(b"HTTP/1.1 ", patience=0.05)
    assert (answer.status, answer.code, answer.good) == (0, "timeout", False)
    answer = await ask(plain(500, b"not JSON"))
    assert (answer.status, answer.code, answer.good) == (500, "500", False)
    answer = await ask(plain(200, b'{"memory_version":7,"blocks":2}'))
    assert (answer.good, answer.version, answer.blocks) == (True, 7, 2)


async def test_a_reader_who_hangs_up() -> None:
    async with server(lambda _: [STREAM, *[token("a")] * 200]) as (client, whole):
        answer = await client.ask("generate", "t", {}, hang_up=3)
        assert (answer.hung_up, answer.good, answer.cut) == (True, False, False)
        assert answer.tokens == answer.events == 3
        await asyncio.sleep(0.1)
        assert whole == [False]


async def test_connections_are_used_again() -> None:
    async with server(lambda _: [plain(200, b"{}")]) as (client, whole):
        for _ in range(3):
            await client.ask("update", "t", {})
        assert len(client._idle) == 1
        assert len(whole) == 3


async def test_arrivals_do_not_wait_for_a_slow_server() -> None:
    """A server that answers none before it has all is sent the others when they are due, and their wait is counted from
    then."""
    all_in = asyncio.Event()

    def answer(number: int) -> Pieces:
        if number == 9:
            all_in.set()
        return [b"HTTP/1.1 ", plain(200, b"{}")[9:]]

    async with server(answer, lambda: asyncio.wait_for(all_in.wait(), 20)) as (client, _):
        sessions = [
            (0.01 * n, Session(f"t{n}", [Act("generate", 0.0, {"max_tokens": 1})])) for n in range(10)
        ]
        lag = Lag()
        began, _ = await open_loop(client, iter(sessions), lag)
        answers = client.answers
        assert len(answers) == 10
        for (at, _), told in zip(sessions, answers, strict=True):
            assert told.due == pytest.approx(began + at, rel=0, abs=1e-6)
            assert told.end > answers[-1].sent >= answers[-1].due
        assert len(lag.requests) == 10


async def test_a_turn_waits_for_the_answer_and_for_thinking() -> None:
    async with server(lambda _: [plain(200, b"{}")]) as (client, _):
        acts = [Act("generate", 0.0, {}), Act("generate", 0.05, {}), Act("generate", 0.0, {})]
        await open_loop(client, iter([(0.0, Session("t", acts))]), Lag())
        first, second, third = client.answers
        assert second.due == pytest.approx(first.end + 0.05, rel=0, abs=1e-6)
        assert third.due == pytest.approx(second.end, rel=0, abs=1e-6)


async def test_who_is_refused_leaves() -> None:
    async with server(lambda _: [plain(503, b'{"error":{"code":"server_overloaded"}}')]) as (client, _):
        await open_loop(client, iter([(0.0, Session("t", [Act("generate", 0.0, {})] * 3))]), Lag())
        assert len(client.answers) == 1
