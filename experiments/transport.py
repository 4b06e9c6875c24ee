"""HTTP/1.1 to one server, as plain as it gets: what a client spends on a request is not left for the server beside it.

httpx's own transport takes ten times as long for a request when thirty connections are open.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import httpx


@dataclass
class PlainAnswer:
    """``fields`` are the header's, names in lower case."""

    status: int
    fields: list[tuple[bytes, bytes]]
    content: bytes = b""

    def field(self, name: bytes) -> bytes | None:
        return next((value for known, value in self.fields if known == name), None)


class Transport(httpx.AsyncBaseTransport):
    """For ``http://`` servers whose answers say their length, or end with the connection.

    At most ``connections`` at once, each used again; a request and its answer take at most ``seconds``.
    """

    def __init__(self, connections: int, seconds: float) -> None:
        self._room = asyncio.Semaphore(connections)
        self._seconds = seconds
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError."""
        body = await request.aread()
        fields = b"".join([b"%s: %s\r\n" % header for header in request.headers.raw])
        try:
            answer = await self.exchange(request.url, request.method, request.url.raw_path, fields, body)
        except httpx.TransportError as error:
            error.request = request
            raise
        return httpx.Response(answer.status, headers=answer.fields, content=answer.content)

    async def exchange(
        self, url: httpx.URL, method: str, target: bytes, fields: bytes, body: bytes
    ) -> PlainAnswer:
        """Asks the server of ``url`` for ``target``. ``fields`` are all header lines, each with its end.

        Raises httpx.TransportError.
        """
        whole = b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode(), target, fields, body)
        try:
            async with self._room, asyncio.timeout(self._seconds):
                return await self._exchange(url, whole)
        except TimeoutError as error:
            raise httpx.ReadTimeout("no answer in time") from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise httpx.ReadError(f"the connection broke: {error!r}") from error
        except (ValueError, IndexError) as error:
            raise httpx.RemoteProtocolError("no HTTP answer") from error

    async def _exchange(self, url: httpx.URL, whole: bytes) -> PlainAnswer:
        reader, writer = await self._connection(url)
        try:
            writer.write(whole)
            await writer.drain()
            first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
            status = int(first.split(b" ", 2)[1])
            parted = (line.partition(b":") for line in lines)
            answer = PlainAnswer(status, [(name.lower(), value.strip()) for name, _, value in parted])
            length = answer.field(b"content-length")
            if answer.field(b"transfer-encoding") is not None:
                raise ValueError("an answer in pieces")
            stays = (answer.field(b"connection") or b"").lower() != b"close"
            if length is not None:
                answer.content = await reader.readexactly(int(length))
            elif status not in (204, 304):
                stays, answer.content = False, await reader.read()
        except BaseException:
            writer.close()
            raise
        if stays:
            self._idle.append((reader, writer))
        else:
            writer.close()
        return answer

    async def _connection(self, url: httpx.URL) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            # a server closes connections that have been idle for some seconds
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
            writer.close()
        try:
            return await asyncio.open_connection(url.host, url.port or 80)
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error

    async def aclose(self) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
