"""Pages in a browser: which may call, what they are told before they do, and that they can read every answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings
from tests.api.conftest import Service, start_service
from tests.api.test_access import bearer, start
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio

PAGE, OTHER = "https://chat.example.com", "https://evil.example.com"
FROM = {"origin": PAGE}
ALLOWED, EXPOSED = "access-control-allow-origin", "access-control-expose-headers"
G = {"tenant": "ada", "prompt": [5, 6, 7], "max_tokens": 2}


def preflight(origin: str = PAGE, method: str = "POST") -> dict[str, str]:
    """As a browser sends it for a page that uses OpenAI's client."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,x-stainless-os,x-tenant",
        "access-control-request-private-network": "true",
    }


@pytest.fixture
def open_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"allow_origin": (PAGE, "http://localhost:3000")})


@pytest.fixture
async def open_service(open_settings: Settings, model_dir: Path) -> AsyncIterator[Service]:
    service = await start_service(open_settings, str(model_dir))
    async with service.http:
        yield service


@pytest.fixture
async def guarded(open_settings: Settings, model_dir: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async for service in start(open_settings, model_dir, tmp_path):
        yield service


async def test_a_preflight_needs_no_key(guarded: Service) -> None:
    for path in ("/generate", "/v1/chat/completions", "/tenants/ada", "/metrics", "/nothing"):
        for origin in (PAGE, "http://localhost:3000"):
            told = await guarded.http.options(path, headers=preflight(origin))
            assert told.status_code == 200
            assert told.headers[ALLOWED] == origin
            assert "POST" in told.headers["access-control-allow-methods"]
            assert "x-stainless-os" in told.headers["access-control-allow-headers"]
            assert told.headers["access-control-allow-private-network"] == "true"
            assert "access-control-allow-credentials" not in told.headers
            assert told.headers["x-request-id"]
    assert guarded.seen == []


async def test_pages_of_other_origins_may_not(open_service: Service) -> None:
    for origin in (OTHER, "null", PAGE + ".evil.com", PAGE.replace("https", "http"), f"{PAGE}:8443"):
        told = await open_service.http.options("/generate", headers=preflight(origin))
        check_error(told, 403, "forbidden")
        assert ALLOWED not in told.headers
        told = await open_service.post("/generate", G, headers={"origin": origin})
        assert ALLOWED not in told.headers
    check_error(await open_service.http.options("/generate", headers=preflight(method="TRACE")), 403)


async def test_without_the_setting_no_page_may(service: Service) -> None:
    assert service.settings.allow_origin == ()
    assert (await service.http.options("/generate", headers=preflight())).status_code == 405
    told = await service.post("/generate", G, headers=FROM)
    assert told.status_code == 200
    assert not [name for name in told.headers if name.startswith("access-control")]


async def test_every_answer_can_be_read(guarded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(status: int, *call: Any, who: str | None = "admin", **more: Any) -> Any:
        more["headers"] = {**FROM, **more.get("headers", {}), **(bearer(who) if who else {})}
        told = await guarded.http.request(*call, **more)
        assert told.status_code == status
        assert told.headers[ALLOWED] == PAGE
        assert set(told.headers[EXPOSED].split(", ")) == {"x-request-id", "retry-after", "x-should-retry"}
        assert "origin" in told.headers["vary"].lower()
        return told

    await check(200, "POST", "/generate", json=G)
    streamed = await check(200, "POST", "/generate", json={**G, "stream": True})
    assert "[DONE]" in streamed.text
    await check(200, "GET", "/health", who=None)
    # made by the routes, and by what is around them
    await check(404, "GET", "/nothing")
    await check(422, "POST", "/generate", json={})
    await check(415, "POST", "/generate", content=b"x")
    assert "retry-after" in (await check(429, "POST", "/generate", json={**G, "tenant": "busy"})).headers
    await check(401, "POST", "/generate", json=G, who=None)
    large = {"content-type": "application/json", "content-length": str(2**40)}
    await check(413, "POST", "/generate", content=b"{}", headers=large)
    guarded.client.drain(5.0)
    await check(503, "POST", "/generate", json=G)

    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(guarded.app.state.services.metrics, "render", broken)
    check_error(await check(500, "GET", "/metrics"), 500, "internal_error")
