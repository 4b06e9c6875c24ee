"""API keys over HTTP: who is turned away, whose tenant it is, and that nobody learns of another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import messages as m
from app.api.access import OPEN_PATHS
from app.api.app import create_app
from app.api.worker import WorkerClient
from app.keys.file import write
from app.keys.ring import Limits, make
from app.keys.watch import WatchedRing
from app.settings import Settings
from tests.api.conftest import Service, start_service
from tests.api.fake_worker import FakeWorker, model_info
from tests.api.test_admission import admission

pytestmark = pytest.mark.anyio

# routes about no tenant
TENANTLESS = {"/metrics", "/v1/models", "/v1/models/{model}"}
KEYS = {
    "ada": make(tenants=["ada"]),
    "team": make(tenants=["team/*", "ada"]),
    "admin": make(admin=True),
    "slow": make(tenants=["hold-1"], limits=Limits(3, 1000, 2, 5)),
    "forks": make(tenants=["hold-1", "hold-2"], limits=Limits(3, 1000, 2, 5)),
}


def bearer(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[who][0]}"}


@pytest.fixture
async def guarded(settings: Settings, model_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async for service in start(settings, model_dir, tmp_path):
        yield service


async def start(settings: Settings, model_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    write(tmp_path / "keys.json", [entry for _, entry in KEYS.values()])
    fake, client = FakeWorker(), WorkerClient()
    app = create_app(settings, client, keys=WatchedRing(tmp_path / "keys.json"))
    http = httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test"
    )
    service = Service(app, client, fake, http, settings)
    loop = asyncio.get_running_loop()

    def work(frame: bytes) -> None:
        for request in m.decode_requests(frame):
            service.answer(*fake.handle(request))

    client.attach(lambda frame: loop.call_soon(work, frame) and None, 0.0)
    client.received([m.Ready(model_info(str(model_dir)), pid=1)], 0.0)
    await client.settled.wait()
    async with http:
        yield service


def calls(service: Service, tenant: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Every route of the app, with a body that it takes."""
    bodies = {
        "/update": {"json": {"tenant": tenant, "text": "The quick brown fox jumps over the lazy dog."}},
        "/generate": {"json": {"tenant": tenant, "prompt": "The quick", "max_tokens": 2}},
        "/score": {"json": {"tenant": tenant, "prompt": "The quick", "continuation": " brown fox"}},
        "/v1/chat/completions": {
            "json": {"messages": [{"role": "user", "content": "The quick"}], "max_tokens": 2},
            "headers": {"x-tenant": tenant},
        },
        "/v1/completions": {
            "json": {"prompt": "The quick", "max_tokens": 2},
            "headers": {"x-tenant": tenant},
        },
        "/tenants": {"json": {"id": tenant}},
        "/tenants/{tenant}/fork": {"json": {"target": f"{tenant}-2"}},
        "/tenants/{tenant}/rollback": {"json": {"version": 0}},
        "/tenants/{tenant}/rebuild": {"json": {}},
        "/tenants/{tenant}/import": {
            "content": b"x",
            "headers": {"content-type": "application/octet-stream"},
        },
    }
    return [
        (method.upper(), route.replace("{tenant}", tenant), bodies.get(route, {}) if method == "post" else {})
        for route, methods in service.app.openapi()["paths"].items()
        for method in methods
    ]


async def test_every_route_but_the_open_ones_wants_a_key(guarded: Service) -> None:
    seen = 0
    for method, path, more in calls(guarded, "ada"):
        answer = await guarded.http.request(method, path, **more)
        if path in OPEN_PATHS:
            assert answer.status_code != 401, path
            continue
        seen += 1
        assert answer.status_code == 401, path
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert seen > 12
    assert guarded.seen == []


async def test_every_route_treats_a_foreign_tenant_as_an_absent_one(guarded: Service) -> None:
    """The same answer, and the worker is not even asked."""
    checked = 0
    for method, path, more in calls(guarded, "bob"):
        if path in OPEN_PATHS or path in TENANTLESS or (method, path) == ("GET", "/tenants"):
            continue
        headers = {**more.pop("headers", {}), **bearer("ada")}
        answer = await guarded.http.request(method, path, headers=headers, **more)
        assert answer.status_code == 404, path
        error = answer.json()["error"]
        assert (error["code"], error["message"]) == ("tenant_not_found", "there is no such tenant")
        checked += 1
    assert checked > 12
    assert guarded.seen == []
    absent = await guarded.http.get("/tenants/ada", headers=bearer("ada"))
    foreign = await guarded.http.get("/tenants/bob", headers=bearer("ada"))
    assert absent.json()["error"] == foreign.json()["error"]
    assert absent.status_code == foreign.status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "")],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer nonsense")],
        [("authorization", f"Basic {KEYS['ada'][0]}")],
        [("authorization", KEYS["ada"][0])],
        [("authorization", f"Bearer {KEYS['ada'][0]}x")],
        [("authorization", f"Bearer {KEYS['ada'][0].replace('-', ' ', 1)}")],
        [("authorization", f"Bearer {'x' * 100_000}")],
        [("authorization", f"Bearer {KEYS['ada'][0]}"), ("authorization", f"Bearer {KEYS['admin'][0]}")],
        [("authorization", "Bearer schlüssel".encode("latin-1"))],
    ],
    ids=range(11),
)
async def test_what_is_no_key(guarded: Service, headers: list[tuple[str, Any]]) -> None:
    answer = await guarded.http.get("/tenants/ada", headers=headers)
    assert answer.status_code == 401
    assert KEYS["ada"][0] not in answer.text
    assert guarded.seen == []


async def test_the_scheme_is_read_in_any_case(guarded: Service) -> None:
    key = KEYS["ada"][0]
    answer = await guarded.http.get("/tenants/ada", headers={"authorization": f"bEARER  {key} "})
    assert answer.status_code == 404


async def test_the_tenant_comes_from_a_key_that_is_for_one(guarded: Service) -> None:
    update = {"text": "The quick brown fox jumps over the lazy dog."}
    answer = await guarded.post("/update", update, headers=bearer("ada"))
    assert answer.status_code == 200
    assert answer.json()["tenant"] == "ada"
    for who in ("team", "admin"):
        answer = await guarded.post("/update", update, headers=bearer(who))
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "tenant"


async def test_nobody_learns_how_busy_anothers_tenant_is(guarded: Service) -> None:
    bound = admission(guarded).of("bob").requests
    bound.take(bound.most)
    body = {"tenant": "bob", "prompt": "The quick", "max_tokens": 2}
    assert (await guarded.post("/generate", body, headers=bearer("ada"))).status_code == 404
    assert (await guarded.post("/generate", body, headers=bearer("admin"))).status_code == 429
    bound.give(bound.most)


async def test_a_key_lists_its_own_tenants_and_no_number_of_others(guarded: Service) -> None:
    for name in ("ada", "bob", "team/1", "team/2", "zoe"):
        await guarded.post("/tenants", {"id": name}, headers=bearer("admin"))
    own = (await guarded.http.get("/tenants", headers=bearer("team"))).json()
    assert own == {"tenants": ["ada", "team/1", "team/2"], "next": None, "total": 3}
    page = (await guarded.http.get("/tenants?limit=1", headers=bearer("team"))).json()
    assert page == {"tenants": ["ada"], "next": "ada", "total": 3}
    page = (await guarded.http.get("/tenants?limit=1&after=ada", headers=bearer("team"))).json()
    assert page["tenants"] == ["team/1"]
    # the worker is asked once, and only about these
    asked = [message for message in guarded.seen if isinstance(message, m.ListTenants)]
    assert [message.only for message in asked] == [["team/*", "ada"]] * 3
    everyone = (await guarded.http.get("/tenants", headers=bearer("admin"))).json()
    assert everyone["total"] == 5


async def test_a_fork_stays_within_the_key(guarded: Service) -> None:
    await guarded.post("/tenants", {"id": "ada"}, headers=bearer("admin"))
    answer = await guarded.post("/tenants/ada/fork", {"target": "bob"}, headers=bearer("team"))
    assert answer.status_code == 404
    answer = await guarded.post("/tenants/ada/fork", {"target": "team/ada"}, headers=bearer("team"))
    assert answer.status_code == 201


async def test_metrics_are_for_admins_or_open(
    guarded: Service, settings: Settings, model_dir: Path, tmp_path: Path
) -> None:
    assert (await guarded.http.get("/metrics", headers=bearer("ada"))).status_code == 403
    assert (await guarded.http.get("/metrics", headers=bearer("admin"))).status_code == 200
    open_settings = settings.model_copy(update={"open_metrics": True})
    async for service in start(open_settings, model_dir, tmp_path):
        assert (await service.http.get("/metrics")).status_code == 200


async def test_a_strangers_body_is_not_read(guarded: Service) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"{}"

    answer = await guarded.http.post("/update", content=body())
    assert answer.status_code == 401
    assert not read
    assert guarded.seen == []


async def test_requests_at_once_are_limited_and_counted_to_their_last_byte(guarded: Service) -> None:
    body = {"prompt": "The quick", "max_tokens": 4}
    running = [asyncio.create_task(guarded.post("/generate", body, headers=bearer("slow"))) for _ in range(2)]
    await guarded.until_seen(m.Generate, 2)
    refused = await guarded.post("/generate", body, headers=bearer("slow"))
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "quota_exceeded"
    assert refused.headers["retry-after"] == "1"
    # another tenant's requests are its own
    other = await guarded.post("/generate", body | {"tenant": "bob"}, headers=bearer("admin"))
    assert other.status_code == 200
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    again = asyncio.create_task(guarded.post("/generate", body, headers=bearer("slow")))
    await guarded.until_seen(m.Generate, 4)
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)


async def test_limits_go_along_with_an_update(guarded: Service) -> None:
    text = {"text": "The quick brown fox jumps over the lazy dog."}
    task = asyncio.create_task(guarded.post("/update", text, headers=bearer("slow")))
    sent = await guarded.until_seen(m.Update)
    assert isinstance(sent, m.Update)
    assert (sent.updates_per_day, sent.most_bytes, sent.weight) == (3, 1000, 5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(("path", "kind"), [("/generate", m.Generate), ("/score", m.Score)])
async def test_the_weight_of_a_key_goes_along_with_what_reads(
    guarded: Service, path: str, kind: type[m.Generate] | type[m.Score]
) -> None:
    body = {"prompt": "The quick", **({"continuation": " brown fox"} if path == "/score" else {})}
    for count, (who, weight) in enumerate((("slow", 5), ("admin", 1)), 1):
        task = asyncio.create_task(guarded.post(path, {"tenant": "hold-1", **body}, headers=bearer(who)))
        sent = await guarded.until_seen(kind, count)
        assert isinstance(sent, kind)
        assert sent.weight == weight
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_limits_go_along_with_what_makes_a_memory_or_ends_it(guarded: Service) -> None:
    octets = {**bearer("slow"), "content-type": "application/octet-stream"}
    # as the fake worker exports version 0 of it
    await guarded.http.post("/tenants/hold-1/import", content=b"hold-1 0 False", headers=octets)
    imported = await guarded.until_seen(m.ImportTenant)
    assert isinstance(imported, m.ImportTenant)
    assert imported.most_bytes == 1000
    await guarded.post("/tenants/hold-1/fork", {"target": "hold-2"}, headers=bearer("forks"))
    forked = await guarded.until_seen(m.ForkTenant)
    assert isinstance(forked, m.ForkTenant)
    assert forked.most_bytes == 1000
    await guarded.post("/tenants/hold-1/rebuild", {"force": True}, headers=bearer("slow"))
    rebuilt = await guarded.until_seen(m.RebuildTenant)
    assert isinstance(rebuilt, m.RebuildTenant)
    assert rebuilt.most_bytes == 1000
    await guarded.http.delete("/tenants/hold-1", headers=bearer("slow"))
    erased = await guarded.until_seen(m.EraseTenant)
    assert isinstance(erased, m.EraseTenant)
    assert erased.updates_per_day == 3


async def test_a_tenant_is_told_its_limits(guarded: Service) -> None:
    await guarded.post("/tenants", {"id": "hold-1"}, headers=bearer("slow"))
    seen = (await guarded.http.get("/tenants/hold-1", headers=bearer("slow"))).json()
    assert seen["limits"] == {"updates_per_day": 3, "bytes": 1000, "concurrent": 2}
    seen = (await guarded.http.get("/tenants/hold-1", headers=bearer("admin"))).json()
    assert seen["limits"] == {"updates_per_day": 0, "bytes": 0, "concurrent": 0}


@pytest.mark.parametrize("limits", [Limits(3, 1000, 2), Limits()])
async def test_without_keys_the_settings_limits_hold(
    settings: Settings, model_dir: Path, limits: Limits
) -> None:
    names = ("tenant_updates_per_day", "tenant_bytes", "tenant_concurrent")
    told = (limits.updates_per_day, limits.bytes, limits.concurrent)
    own = settings.model_copy(update=dict(zip(names, told, strict=True)))
    service = await start_service(own, str(model_dir))
    async with service.http:
        body = {"tenant": "hold", "text": "The quick brown fox jumps over the lazy dog."}
        running = [asyncio.create_task(service.post("/update", body)) for _ in range(2)]
        sent = await service.until_seen(m.Update, 2)
        assert isinstance(sent, m.Update)
        assert (sent.updates_per_day, sent.most_bytes, sent.weight) == (*told[:2], 1)
        running.append(asyncio.create_task(service.post("/update", body)))
        if limits.concurrent:
            assert (await running[-1]).json()["error"]["code"] == "quota_exceeded"
        else:
            await service.until_seen(m.Update, 3)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_the_document_names_the_scheme(guarded: Service) -> None:
    document = (await guarded.http.get("/openapi.json")).json()
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "401" in document["paths"]["/update"]["post"]["responses"]
