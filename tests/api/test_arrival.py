"""Bodies that come slowly: they are given up in time, and what is counted for them is their key's until then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.api.arrival import SLOWEST, Arrival
from app.errors import RequestTooSlow
from app.settings import Settings
from tests.api.conftest import Service, until
from tests.api.test_access import bearer, start
from tests.api.test_admission import admission, bounded
from tests.api.test_bad_input import check_error
from tests.api.test_transfers import Exchange

pytestmark = pytest.mark.anyio

Skip = Callable[[float], Awaitable[None]]
JSON = {"content-type": "application/json"}
# every path that takes a body, an import's apart
PATHS = (
    "/generate",
    "/update",
    "/score",
    "/tenants",
    "/tenants/a/fork",
    "/tenants/a/rollback",
    "/tenants/a/rebuild",
)


def post(service: Service, path: str, who: str | None = None) -> Exchange:
    return Exchange(service, "POST", path, JSON | (bearer(who) if who else {}))


def told(exchange: Exchange) -> tuple[int, str, dict[bytes, bytes]]:
    body = json.loads(b"".join(message.get("body", b"") for message in exchange.sent))
    return exchange.status, body["error"]["code"], dict(exchange.sent[0]["headers"])


@pytest.fixture
async def guarded(model_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    settings = Settings(store="disk:///nowhere", queue_bytes=1000, queue_bytes_tenant=400)
    async for service in start(settings, model_dir, tmp_path):
        yield service


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_stops_is_given_up(model_dir: Path, path: str, pass_time: Skip) -> None:
    async with bounded(model_dir) as service:
        exchange = post(service, path)
        exchange.body(b" " * 300, more=True)
        await until(lambda: admission(service).server.bytes.used == 300)
        await pass_time(29.0)
        assert not exchange.task.done()
        await pass_time(2.0)
        await until(exchange.task.done)
        status, code, headers = told(exchange)
        assert (status, code) == (408, "request_too_slow")
        # what is left of it is not waited for
        assert headers[b"connection"] == b"close"
        assert admission(service).server.unused


async def test_a_trickle_is_no_way_round_it(service: Service, pass_time: Skip) -> None:
    exchange = post(service, "/generate")
    for _ in range(5):
        exchange.body(b" ", more=True)
        await exchange.taken()
        await pass_time(10.0)
    await until(exchange.task.done)
    assert told(exchange)[:2] == (408, "request_too_slow")


async def test_a_slow_link_is_no_fault(pass_time: Skip) -> None:
    """The largest body, at 128 KiB/s, and none of the time in which the server does something else."""
    arrival = Arrival(Settings().body_timeout)

    async def coming(seconds: float) -> None:
        await pass_time(seconds)

    for _ in range(8):
        await arrival.piece(coming(8.0))
        arrival.came(1 << 20)
        await pass_time(100.0)
    for _ in range(3):
        await arrival.piece(coming(29.0))
    stopped = asyncio.Event()
    arrival = Arrival(30.0)
    arrival.came(60 * SLOWEST)
    waiting = asyncio.create_task(arrival.piece(stopped.wait()))
    await pass_time(31.0)
    await until(waiting.done)
    with pytest.raises(RequestTooSlow):
        await waiting


async def test_a_request_that_is_whole_may_take_its_time(service: Service, pass_time: Skip) -> None:
    exchange = post(service, "/generate")
    exchange.body(json.dumps({"tenant": "hold", "prompt": [5, 6], "max_tokens": 4}).encode())
    await until(lambda: bool(service.fake.held))
    await pass_time(100.0)
    assert not exchange.task.done()
    exchange.hang_up()
    await until(exchange.task.done)
    assert exchange.status == 499


async def test_one_key_cannot_fill_the_server_with_bodies_that_do_not_end(guarded: Service) -> None:
    bounds = admission(guarded)
    slow = [post(guarded, "/generate", "ada") for _ in range(4)]
    for exchange in slow:
        exchange.body(b" " * 150, more=True)
    await until(lambda: sum(exchange.task.done() for exchange in slow) == 2)
    assert bounds.server.bytes.used == 300
    refused = [exchange for exchange in slow if exchange.task.done()]
    assert [told(exchange)[:2] for exchange in refused] == [(429, "tenant_queue_full")] * 2
    assert all(int(told(exchange)[2][b"retry-after"]) >= 1 for exchange in refused)
    # one that tells its length is refused before it sends anything
    announced = {**JSON, **bearer("ada"), "content-length": "150"}
    exchange = Exchange(guarded, "POST", "/generate", announced)
    await until(exchange.task.done)
    assert told(exchange)[:2] == (429, "tenant_queue_full")
    # the others have theirs
    body: dict[str, Any] = {"prompt": [5, 6], "max_tokens": 2, "stop": "x" * 200}
    answer = await guarded.post("/generate", {"tenant": "team/1", **body}, headers=bearer("team"))
    assert answer.status_code == 200
    for exchange in slow:
        exchange.hang_up()
        await until(exchange.task.done)
    assert (await guarded.post("/generate", body, headers=bearer("ada"))).status_code == 200
    assert bounds.server.unused
    assert not bounds.arriving


async def test_a_body_that_is_there_is_its_tenants_alone(guarded: Service) -> None:
    """A key for many has room for the bodies of the next as soon as the last have come."""
    body = {"prompt": [5, 6], "max_tokens": 2, "stop": "x" * 100}
    calls = [
        asyncio.create_task(
            guarded.post("/generate", {"tenant": name, **body, "stream": True}, headers=bearer("admin"))
        )
        for name in ("hold-a", "hold-b", "hold-c")
    ]
    await until(lambda: len(guarded.fake.held) == 3)
    bounds = admission(guarded)
    assert bounds.server.bytes.used > 400
    assert not bounds.arriving
    assert sum(own.bytes.used for own in bounds.tenants.values()) == bounds.server.bytes.used
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert bounds.server.unused
    check_error(await guarded.post("/generate", {"tenant": 5}, headers=bearer("admin")), 422)
    assert bounds.server.unused
    assert not bounds.arriving


async def test_bodies_of_all_paths_are_counted(model_dir: Path) -> None:
    async with bounded(model_dir, queue_bytes=250) as service:
        first, *others = [post(service, path) for path in ("/tenants/a/fork", *PATHS)]
        first.body(b" " * 200, more=True)
        await until(lambda: admission(service).server.bytes.used == 200)
        for exchange in others:
            exchange.body(b" " * 100, more=True)
            await until(exchange.task.done)
            assert told(exchange)[:2] == (503, "server_overloaded")
        first.hang_up()
        await until(first.task.done)
        assert admission(service).server.unused
