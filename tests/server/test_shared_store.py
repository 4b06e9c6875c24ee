"""Two real servers on one Redis: a tenant goes from one to the other, and who does not have it says when to come."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from app.store.redis_leases import Keys
from tests.server.process import START_SECONDS, ServerProcess
from tests.store.redisserver import RedisServer

TEXT = list(range(20, 60))


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def servers(redis_server: RedisServer) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    url = f"{redis_server.url}?lease=2"
    with ServerProcess(url) as first, ServerProcess(url) as second:
        yield first, second


def patiently(server: ServerProcess, tenant: str) -> int:
    """Updates as a client does that comes back when it was told; the version it made."""
    end = time.monotonic() + START_SECONDS
    while True:
        answer = server.post("/update", tenant=tenant, text=TEXT)
        if answer.status_code == 200:
            return int(answer.json()["memory_version"])
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == "tenant_elsewhere"
        wait = int(answer.headers["retry-after"])
        assert 1 <= wait <= 2, "an idle server gives way within a fifth of its lease"
        assert time.monotonic() < end, "the other server never gave way"
        time.sleep(wait)


def test_a_tenant_goes_to_and_fro(servers: tuple[ServerProcess, ServerProcess]) -> None:
    versions = [patiently(servers[turn % 2], "ada") for turn in range(4)]
    assert versions == [1, 2, 3, 4]


def test_every_call_that_writes_says_when_to_come_back(
    servers: tuple[ServerProcess, ServerProcess], redis_server: RedisServer
) -> None:
    first, second = servers
    first.update("eve", TEXT)
    lease = Keys("memoryllm").of("eve", "lease")
    with redis_server.client() as client:
        assert client.exists(lease)
        # a third server is at work
        client.set(lease, "1000000:third")
        for method, path, body in (
            ("POST", "/update", {"tenant": "eve", "text": TEXT}),
            ("POST", "/generate", {"tenant": "eve", "prompt": TEXT}),
            ("POST", "/score", {"tenant": "eve", "prompt": TEXT, "continuation": [5]}),
            ("POST", "/tenants/eve/fork", {"target": "fay"}),
            ("POST", "/tenants/eve/rollback", {"version": 0}),
            ("DELETE", "/tenants/eve", None),
        ):
            answer = second.http.request(method, path, json=body)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.json()["error"]["code"] == "tenant_elsewhere"
            assert answer.headers["retry-after"] == "1"
        for path in ("", "/history", "/memory", "/export"):
            assert second.http.get(f"/tenants/eve{path}").status_code == 200
        client.delete(lease)
    assert second.http.get("/tenants/fay").status_code == 404
    assert patiently(second, "eve") == 2
