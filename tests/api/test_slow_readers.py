"""Clients that do not read their streams: they hold up nobody, and what is kept for them is bounded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app import messages as m
from app.api import stream as module
from app.settings import Settings
from tests.api.conftest import Service, start_service, until
from tests.api.test_admission import IDS, admission
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(model_dir: Path, **options: Any) -> AsyncIterator[Service]:
    service = await start_service(Settings(store="disk:///nowhere", **options), str(model_dir))
    async with service.http:
        yield service


@dataclass
class Reader:
    """A client below HTTP, that takes a piece of its stream only when it is told to."""

    service: Service
    got: list[dict[str, Any]] = field(default_factory=list)
    reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))
    aborted: bool = False

    async def __call__(self) -> None:
        body = json.dumps({"tenant": "hold", "prompt": IDS, "max_tokens": 300, "stream": True}).encode()
        sent = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if sent:
                return sent.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            await self.reads.acquire()
            self.got.append(message)

        def abort() -> None:
            self.aborted = True

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": "/generate", "raw_path": b"/generate", "headers": headers,
                 "query_string": b"", "http_version": "1.1", "scheme": "http", "abort": abort}  # fmt: skip
        await self.service.app(scope, receive, send)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.got).decode()


def more(service: Service, count: int) -> None:
    (held,) = service.fake.held.values()
    service.answer(*(m.Tokens(held.id, [5]) for _ in range(count)))


async def test_one_who_is_far_behind_is_cut_off_and_told(model_dir: Path) -> None:
    async with serving(model_dir, stream_backlog=20) as service:
        reader = Reader(service)
        call = asyncio.create_task(reader())
        await until(lambda: len(reader.got) == 2)
        more(service, 15)
        assert not any(isinstance(r, m.Cancel) for r in service.seen)
        more(service, 100)
        await service.until_seen(m.Cancel)
        # the step loop is nobody's to hold
        assert (await service.post("/generate", {"tenant": "ann", "prompt": IDS})).status_code == 200
        # when he reads again, he gets what was kept, and why it ends
        for _ in range(50):
            reader.reads.release()
        await call
        assert '"code":"client_too_slow"' in reader.text
        assert 18 <= reader.text.count("!") <= 24
        assert reader.got[-1]["more_body"] is False
        assert admission(service).server.unused


async def test_one_who_has_stopped_reading_is_disconnected(model_dir: Path) -> None:
    async with serving(model_dir, stream_stall_timeout=0.2) as service:
        reader = Reader(service)
        call = asyncio.create_task(reader())
        await until(lambda: len(reader.got) == 2)
        more(service, 5)
        async with asyncio.timeout(10):
            await call
        assert reader.aborted
        assert isinstance(await service.until_seen(m.Cancel), m.Cancel)
        assert admission(service).server.unused
        assert not service.client.open_requests


async def test_a_worker_that_says_nothing_at_a_deadline(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs: the API answers for it."""
    monkeypatch.setattr(module, "LATE_SECONDS", 0.05)
    async with serving(model_dir) as service:
        began = time.monotonic()
        answer = await service.post("/generate", {"tenant": "mute", "prompt": IDS, "timeout": 0.1})
        check_error(answer, 504, "deadline_exceeded")
        assert time.monotonic() - began >= 0.1
        await service.until_seen(m.Cancel)
        streamed = await service.post(
            "/generate", {"tenant": "hold", "prompt": IDS, "timeout": 0.1, "stream": True}
        )
        assert "event: error" in streamed.text
        assert '"code":"deadline_exceeded"' in streamed.text
