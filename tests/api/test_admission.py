"""Bounded queues: what is refused, by whom, with which status, and that everything taken is given back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.admission import Admission, Admit, Place
from app.api.spool import Spool
from app.api.tokens import Tokenizer
from app.errors import ServerBusy, TenantBusy
from app.messages import Failed, Generate, KeptText, RebuildTenant, RollbackTenant, Update
from app.settings import Settings
from tests.api.conftest import Service, start_service, until
from tests.api.test_bad_input import check_error
from tests.api.test_bounds import Clock

pytestmark = pytest.mark.anyio

IDS = [5, 6, 7, 8]


@asynccontextmanager
async def bounded(model_dir: Path, **bounds: int) -> AsyncIterator[Service]:
    service = await start_service(Settings(store="disk:///nowhere", **bounds), str(model_dir))  # type: ignore[arg-type]
    async with service.http:
        yield service


def admission(service: Service) -> Admission:
    layer: Any = service.app.build_middleware_stack()
    while not isinstance(layer, Admit):
        layer = layer.app
    return layer._admission


def hold(service: Service, tenant: str, **more: object) -> asyncio.Task[httpx.Response]:
    body = {"tenant": tenant, "prompt": IDS, "max_tokens": 4, **more}
    return asyncio.create_task(service.post("/generate", body))


async def ended(*calls: asyncio.Task[httpx.Response]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


def check_refused(response: httpx.Response, status: int, code: str) -> None:
    check_error(response, status, code)
    assert 1 <= int(response.headers["retry-after"]) <= 60


async def test_a_tenants_own_bound_is_429_and_others_are_served(model_dir: Path) -> None:
    async with bounded(model_dir, queue_requests_tenant=2) as service:
        calls = [hold(service, "mute"), hold(service, "mute")]
        await service.until_seen(Generate, 2)
        for body in ({"prompt": IDS}, {"prompt": IDS, "stream": True}):
            check_refused(
                await service.post("/generate", {"tenant": "mute", **body}), 429, "tenant_queue_full"
            )
        check_refused(
            await service.post("/update", {"tenant": "mute", "text": IDS}), 429, "tenant_queue_full"
        )
        assert (await service.post("/generate", {"tenant": "ann", "prompt": IDS})).status_code == 200
        assert sum(isinstance(r, Generate | Update) for r in service.seen) == 3
        await ended(*calls)
        assert not admission(service).tenants
        assert admission(service).server.unused


async def test_the_servers_bound_is_503_before_the_body_is_read(model_dir: Path) -> None:
    async with bounded(model_dir, queue_requests=2) as service:
        calls = [hold(service, "mute"), hold(service, "mute")]
        await service.until_seen(Generate, 2)
        read = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal read
            read += 1
            yield b'{"tenant": "ann", "prompt": "x"}'

        headers = {"content-type": "application/json"}
        for path in ("/generate", "/update", "/score", "/v1/chat/completions", "/v1/completions"):
            response = await service.http.post(path, content=body(), headers=headers)
            check_refused(response, 503, "server_overloaded")
        assert read == 0
        assert (await service.http.get("/health")).status_code == 200
        assert (await service.http.get("/ready")).status_code == 200
        await ended(*calls)
        assert (await service.post("/generate", {"tenant": "ann", "prompt": IDS})).status_code == 200
        assert admission(service).server.unused


@pytest.mark.parametrize(
    ("bounds", "status", "code"),
    [
        ({"queue_tokens_tenant": 5}, 429, "tenant_queue_full"),
        ({"queue_tokens": 5}, 503, "server_overloaded"),
    ],
)
async def test_waiting_tokens(model_dir: Path, bounds: dict[str, int], status: int, code: str) -> None:
    async with bounded(model_dir, **bounds) as service:
        call = hold(service, "mute")
        await service.until_seen(Generate)
        more = {"tenant": "mute", "prompt": IDS, "max_tokens": 1}
        check_refused(await service.post("/generate", more), status, code)
        # what could never fit is not asked to come again
        never = await service.post("/generate", {**more, "prompt": [*IDS, *IDS]})
        check_error(never, 422, "too_many_tokens", "prompt")
        assert "retry-after" not in never.headers
        await ended(call)
        # tokens that have been read wait no longer
        call = hold(service, "hold")
        await service.until_seen(Generate, 2)
        await until(lambda: not admission(service).server.tokens.used)
        assert (await service.post("/generate", {**more, "tenant": "ann"})).status_code == 200
        await ended(call)
        assert admission(service).server.unused


async def test_an_updates_tokens_are_given_back_block_by_block(model_dir: Path) -> None:
    async with bounded(model_dir) as service:
        call = asyncio.create_task(service.post("/update", {"tenant": "hold", "text": IDS * 24}))
        await service.until_seen(Update)
        await until(lambda: admission(service).server.tokens.used == 32)
        await ended(call)


@pytest.mark.parametrize(
    ("bounds", "status", "code"),
    [
        ({"queue_bytes_tenant": 400}, 429, "tenant_queue_full"),
        ({"queue_bytes": 400}, 503, "server_overloaded"),
    ],
)
async def test_bytes_of_bodies(model_dir: Path, bounds: dict[str, int], status: int, code: str) -> None:
    async with bounded(model_dir, **bounds) as service:
        call = hold(service, "mute", stop="x" * 200)
        await service.until_seen(Generate)
        more = {"tenant": "mute", "prompt": IDS, "stop": "x" * 150}
        check_refused(await service.post("/generate", more), status, code)
        never = await service.post("/generate", {**more, "stop": ["x" * 200, "y" * 200]})
        check_error(never, 413, "body_too_large")
        await ended(call)
        assert (await service.post("/generate", {**more, "tenant": "ann"})).status_code == 200
        assert admission(service).server.unused


async def test_bytes_that_nobody_announced_are_counted_as_they_come(model_dir: Path) -> None:
    async with bounded(model_dir, queue_bytes=400) as service:
        go = asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b" " * 300
            await go.wait()

        async def large() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 50

        headers = {"content-type": "application/json"}
        call = asyncio.create_task(service.http.post("/generate", content=slow(), headers=headers))
        await until(lambda: admission(service).server.bytes.used == 300)
        refused = await service.http.post("/generate", content=large(), headers=headers)
        check_refused(refused, 503, "server_overloaded")
        await ended(call)
        assert admission(service).server.unused
        never = await service.http.post("/generate", content=large(), headers=headers)
        check_error(never, 413, "body_too_large")


async def test_what_is_refused_is_not_cut_into_tokens(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bounded(model_dir, queue_requests_tenant=1, queue_tokens=756) as service:
        call = hold(service, "mute")
        await service.until_seen(Generate)

        def encode(*_: object, **__: object) -> None:
            raise AssertionError("tokenised in vain")

        monkeypatch.setattr(Tokenizer, "encode", encode)
        text = "never " * 1000
        refused = await service.post("/generate", {"tenant": "mute", "prompt": text})
        check_refused(refused, 429, "tenant_queue_full")
        refused = await service.post("/update", {"tenant": "ann", "text": text})
        check_refused(refused, 503, "server_overloaded")
        await ended(call)


async def test_whatever_ends_a_request_gives_its_place_back(model_dir: Path) -> None:
    async with bounded(model_dir) as service:
        generate = {"tenant": "ann", "prompt": IDS, "max_tokens": 3}
        for path, body in (
            ("/generate", generate),
            ("/generate", {**generate, "stream": True}),
            ("/generate", {**generate, "tenant": "overloaded"}),
            ("/generate", {**generate, "tenant": "busy", "stream": True}),
            ("/generate", {**generate, "prompt": [10**6]}),
            ("/generate", {"tenant": "ann"}),
            ("/update", {"tenant": "full-later", "text": IDS * 20}),
            ("/update", {"tenant": "ann", "text": IDS * 20, "stream": True}),
            ("/score", {"tenant": "ann", "prompt": IDS, "continuation": IDS}),
        ):
            await service.post(path, body)
            assert not admission(service).tenants, (path, body)
            assert admission(service).server.unused, (path, body)
        gone = hold(service, "hold", stream=True)
        await service.until_seen(Generate)
        await ended(gone)
        assert admission(service).server.unused


async def test_whoever_asks_for_a_memory_takes_a_place_too(model_dir: Path) -> None:
    asked: list[tuple[str, str, object]] = [
        ("GET", "/tenants/hold", None),
        ("GET", "/tenants/hold/memory", None),
        ("GET", "/tenants/hold/history", None),
        ("GET", "/tenants/hold/export", None),
        ("POST", "/tenants", {"id": "hold"}),
        ("POST", "/tenants/hold/fork", {"target": "bob"}),
        ("POST", "/tenants/hold/rollback", {"version": 0}),
        ("POST", "/tenants/hold/rebuild", {}),
        ("DELETE", "/tenants/hold", None),
    ]
    for bound, status, code in (("queue_requests_tenant", 429, "tenant_queue_full"),
                                ("queue_requests", 503, "server_overloaded")):  # fmt: skip
        async with bounded(model_dir, **{bound: 1}) as service:
            call = hold(service, "hold")
            await service.until_seen(Generate)
            for method, path, body in asked:
                check_refused(await service.http.request(method, path, json=body), status, code)
            listed = await service.http.get("/tenants")
            assert listed.status_code == (200 if status == 429 else 503)
            assert len(service.seen) == 2 - (status == 503)
            await ended(call)
            assert (await service.http.get("/tenants")).status_code == 200
            assert (await service.http.get("/tenants/hold")).status_code == 200
            assert admission(service).server.unused


async def test_a_rebuilds_tokens_wait_as_an_updates_do_however_many_they_are(model_dir: Path) -> None:
    async with bounded(model_dir, queue_tokens_tenant=10) as service:
        service.fake.memories["foreign"] = 1
        service.fake.texts = [KeptText(1, 9, "The quick brown fox jumps over the lazy dog. " * 9)]
        handle = service.fake.handle

        def silent(request: Any) -> Any:
            answers = handle(request)
            return [] if isinstance(request, RebuildTenant) else answers

        service.fake.handle = silent  # type: ignore[method-assign]
        call = asyncio.create_task(service.post("/tenants/foreign/rebuild", {}))
        await service.until_seen(RebuildTenant)
        assert admission(service).server.tokens.used == 10
        refused = await service.post("/generate", {"tenant": "foreign", "prompt": IDS})
        check_refused(refused, 429, "tenant_queue_full")
        await ended(call)
        assert admission(service).server.unused


@pytest.mark.parametrize("error", [ServerBusy, TenantBusy])
def test_what_the_worker_refuses_waits_for_the_pace_of_what_it_serves(
    error: type[ServerBusy] | type[TenantBusy],
) -> None:
    clock = Clock()
    admission = Admission(Settings(store="disk:///nowhere"), clock)
    serving = [Place(admission) for _ in range(20)]
    for place in serving:
        place.enter("ann")
    for place in serving[:10]:
        clock.now += 4.0
        place.leave()
    served = clock.now
    # a crowd that is refused says nothing of the pace; each is told to come behind the one before
    for number in range(1, 6):
        clock.now += 0.1
        place = Place(admission)
        place.enter("ann")
        told = error("full")
        place.heard(told)
        assert told.retry_after == pytest.approx(4.0 * number, rel=0.2)
        place.leave()
    for bounds in (admission.server, admission.tenants["ann"]):
        assert bounds.requests._given[-1] == (served - 1000.0, 1)


@pytest.mark.parametrize(("what", "body"), [("rollback", {"version": 0}), ("rebuild", {"force": True})])
async def test_who_is_refused_by_the_worker_is_told_when_to_come(
    service: Service, what: str, body: dict[str, object]
) -> None:
    service.fake.memories["ann"] = 1
    handle = service.fake.handle

    def full(request: Any) -> Any:
        if isinstance(request, RollbackTenant | RebuildTenant):
            return [Failed(request.id, "server_overloaded", "too many requests are waiting")]
        return handle(request)

    service.fake.handle = full  # type: ignore[method-assign]
    check_refused(await service.post(f"/tenants/ann/{what}", body), 503, "server_overloaded")


def test_a_transfer_too_many_waits_for_the_pace_of_the_others(tmp_path: Path) -> None:
    clock = Clock()
    spool = Spool(tmp_path, 2, clock)
    for _ in range(8):
        with spool.file("ann"):
            clock.now += 7.0
    with spool.file("ann"), spool.file("bob"), pytest.raises(ServerBusy) as refused, spool.file("eve"):
        pass
    assert refused.value.retry_after == pytest.approx(7.0, rel=0.2)
    spool.close()


async def test_retry_after_while_nobody_knows(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first start, one that takes longer than the last, one behind a pause, and what the worker itself refuses."""
    client, now = service.client, 1000.0
    monkeypatch.setattr("app.api.worker.time.monotonic", lambda: now)

    async def told(error: str = "worker_unavailable") -> int:
        response = await service.post("/generate", {"tenant": "ann", "prompt": IDS})
        check_refused(response, 503, error)
        return int(response.headers["retry-after"])

    client.detach("the worker ended")
    client._starting = 0.0
    client.attach(lambda _: None, now)
    now += 13.0
    assert await told() == 13
    client._starting = 20.0
    client.attach(lambda _: None, now)
    now += 25.0
    assert await told() == 5
    client.detach("the worker ended")
    client.delayed(8.0)
    assert await told() == 28


async def test_who_is_turned_away_by_a_worker_that_drains(service: Service) -> None:
    fake, client = service.fake, service.client

    def drained(request: Any) -> Any:
        if not isinstance(request, Generate):
            return []
        client.drain(30.0)
        return [Failed(request.id, "worker_unavailable", "the server is shutting down")]

    fake.handle = drained  # type: ignore[method-assign]
    response = await service.post("/generate", {"tenant": "ann", "prompt": IDS})
    check_refused(response, 503, "worker_unavailable")
    assert 29 <= int(response.headers["retry-after"]) <= 30


async def test_retry_after_is_as_long_as_the_last_start(service: Service) -> None:
    service.client._starting = 20.0
    service.client.detach("the worker ended")
    response = await service.post("/generate", {"tenant": "ann", "prompt": IDS})
    check_refused(response, 503, "worker_unavailable")
    assert 19 <= int(response.headers["retry-after"]) <= 20
    service.client.drain(40.0)
    response = await service.post("/generate", {"tenant": "ann", "prompt": IDS})
    assert 39 <= int(response.headers["retry-after"]) <= 40
