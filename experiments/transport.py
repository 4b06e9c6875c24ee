"""HTTP/1.1 to one server, as plain as it gets: what a client spends on a request is not left for the server beside it.

httpx's own transport takes ten times as long for a request when thirty connections are open.
"""

from __future__ import annotations

import asyncio

import httpx


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
        try:
            async with self._room, asyncio.timeout(self._seconds):
                return await self._exchange(request, body)
        except TimeoutError as error:
            raise httpx.ReadTimeout("no answer in time", request=request) from error
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise httpx.ReadError(f"the connection broke: {error!r}", request=request) from error
        except (ValueError, IndexError) as error:
            raise httpx.RemoteProtocolError("no HTTP answer", request=request) from error

    async def _exchange(self, request: httpx.Request, body: bytes) -> httpx.Response:
        reader, writer = await self._connection(request.url)
        try:
            lines = [b"%s: %s\r\n" % header for header in request.headers.raw]
            first = b"%s %s HTTP/1.1\r\n" % (request.method.encode(), request.url.raw_path)
            writer.write(first + b"".join(lines) + b"\r\n" + body)
            await writer.drain()
            status, *fields = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
            code = int(status.split(b" ", 2)[1])
            headers = httpx.Headers(
                [(name, value.strip()) for name, _, value in (f.partition(b":") for f in fields)]
            )
            length = headers.get("content-length")
            if "transfer-encoding" in headers:
                raise ValueError("an answer in pieces")
            stays = headers.get("connection", "").lower() != "close"
            if length is not None:
                content = await reader.readexactly(int(length))
            elif code in (204, 304):
                content = b""
            else:
                stays, content = False, await reader.read()
        except BaseException:
            writer.close()
            raise
        if stays:
            self._idle.append((reader, writer))
        else:
            writer.close()
        return httpx.Response(code, headers=headers, content=content)

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
