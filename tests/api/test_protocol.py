"""When a request came in, however long those before it keep the loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import uvicorn

from app.api.protocol import Protocol
from app.api.server import listen

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_requests_that_come_together_began_together() -> None:
    waited: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        waited.append(time.perf_counter() - scope["began"])
        time.sleep(0.05)  # noqa: ASYNC251
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, http=Protocol, lifespan="off", ws="none", log_config=None))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    for _ in range(500):
        if server.started:
            break
        await asyncio.sleep(0.01)
    address = listener.getsockname()[:2]
    connections = [await asyncio.open_connection(*address) for _ in range(3)]
    await asyncio.sleep(0.05)
    for _, writer in connections:
        writer.write(REQUEST)
    for reader, writer in connections:
        assert b"204" in await reader.readline()
        writer.close()
    server.should_exit = True
    await serving
    assert min(waited) < 0.05
    assert max(waited) >= 0.1
