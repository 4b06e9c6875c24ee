"""When a request came in, however long those before it keep the loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn

import app.api.protocol
from app.api.protocol import Protocol
from app.api.server import listen

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


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

    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(application, http=Protocol, lifespan="off", ws="none", log_config=None)
    )
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
    assert began == [0.0, 0.0, 0.0]
