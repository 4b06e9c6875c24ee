"""The plain transport against a server that behaves, and some that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from experiments.transport import Transport

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(handler: Handler, ask: Callable[[httpx.AsyncClient], Awaitable[None]], seconds: float = 20.0) -> int:
    """``ask`` against a server of ``handler``, one connection a call of it; how many there were."""
    made = 0

    async def main() -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal made
            made += 1
            try:
                await handler(reader, writer)
            finally:
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", transport=Transport(2, seconds), trust_env=False
        ) as client:
            await ask(client)
        server.close()

    asyncio.run(main())
    return made


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        length = next(
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        body = head.split(b" ", 2)[1] + b" " + await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def test_many_at_once_share_a_few_connections() -> None:
    async def ask(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post("/a?b=1", content=f"{i}") for i in range(20)))
        assert [answer.text for answer in answers] == [f"/a?b=1 {i}" for i in range(20)]

    assert run(echo, ask) == 2


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async def ask(client: httpx.AsyncClient) -> None:
        for _ in range(2):
            assert (await client.get("/")).status_code == 204
            # until the end of the connection has come
            await asyncio.sleep(0.05)

    assert run(once, ask) == 2


def test_an_answer_without_length_ends_with_its_connection() -> None:
    async def unsized(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Busy\r\nRetry-After: 2\r\n\r\nlater")

    async def ask(client: httpx.AsyncClient) -> None:
        answer = await client.get("/")
        assert (answer.status_code, answer.headers["retry-after"], answer.text) == (503, "2", "later")

    run(unsized, ask)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"", httpx.ReadError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort", httpx.ReadError),
        (b"no such protocol\r\n\r\n", httpx.RemoteProtocolError),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", httpx.RemoteProtocolError),
    ],
)
def test_what_goes_wrong_is_a_transport_error(said: bytes, error: type[Exception]) -> None:
    async def broken(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)

    async def ask(client: httpx.AsyncClient) -> None:
        with pytest.raises(error):
            await client.get("/")

    run(broken, ask)


def test_silence_and_a_closed_port_are_transport_errors() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async def ask(client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/")
        with pytest.raises(httpx.ConnectError):
            await client.get("http://127.0.0.1:1/")

    run(silent, ask, seconds=0.1)
