"""Names by which a server without keys is called: a page of a stranger's can have any but its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api.access import OPEN_PATHS
from app.api.app import create_app
from app.api.hosts import asks_for_host
from app.api.worker import WorkerClient
from app.settings import Settings
from tests.api.test_bad_input import check_error
from tests.api.test_server import serving, until

pytestmark = pytest.mark.anyio

OWN = socket.gethostname()
GOOD = [
    "localhost",
    "LocalHost:8000",
    "localhost.:8000",
    "a.b.localhost:8000",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.1",
    "192.168.1.5:8000",
    "[::1]",
    "[::1]:8000",
    "host.docker.internal:8000",
    OWN,
    f"{OWN.upper()}:8000",
    f"{OWN.partition('.')[0]}.local:8000",
    "",
]
BAD = [
    "evil.example.com",
    "evil.example.com:8000",
    "localhost.evil.com",
    "notlocalhost",
    "127.0.0.1.evil.com",
    "127.0.0.1.nip.io:8000",
    "evil.com:127.0.0.1",
    "internal.evil.com",
    "1.evil",
    "evil.com.",
    "x",
]


def client(**settings: Any) -> httpx.AsyncClient:
    app = create_app(Settings(**settings), WorkerClient(), loopback=True)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000")


async def asked(http: httpx.AsyncClient, *hosts: str, path: str = "/tenants") -> httpx.Response:
    return await http.get(path, headers=[("host", host) for host in hosts])


async def test_names_that_no_stranger_has() -> None:
    async with client() as http:
        for host in GOOD:
            # no worker serves: it was let in
            check_error(await asked(http, host), 503, "worker_unavailable")


async def test_names_that_a_stranger_may_have() -> None:
    async with client() as http:
        for host in BAD:
            told = await asked(http, host)
            check_error(told, 403, "host_not_allowed")
            assert "--allow-host" in told.json()["error"]["message"]
            assert "evil" not in told.text
        for path in ("/metrics", "/v1/models", "/nothing", "/v1/chat/completions", "/tenants/a"):
            check_error(await asked(http, BAD[0], path=path), 403, "host_not_allowed")
        # one that is allowed covers for none that is not
        check_error(await asked(http, "localhost", BAD[0]), 403, "host_not_allowed")


async def test_what_is_told_to_anyone_is_told_under_any_name() -> None:
    async with client() as http:
        for path in OPEN_PATHS:
            assert (await asked(http, BAD[0], path=path)).status_code != 403
    async with client(open_metrics=True) as http:
        assert (await asked(http, "memoryllm:8000", path="/metrics")).status_code == 200


async def test_names_that_were_given() -> None:
    async with client(allow_host="Memory.Example.com, server") as http:
        for host in ("memory.example.com", "memory.example.com:443", "server:8000", "localhost"):
            check_error(await asked(http, host), 503, "worker_unavailable")
        for host in ("example.com", "a.memory.example.com", "x"):
            check_error(await asked(http, host), 403, "host_not_allowed")


@pytest.mark.parametrize(
    ("settings", "keys", "loopback", "asks"),
    [
        ({}, False, True, True),
        ({}, True, True, False),
        ({}, False, False, False),
        ({"insecure": True}, False, True, False),
        ({"insecure": True, "allow_host": "server"}, False, False, True),
        ({"allow_host": "server"}, True, True, False),
    ],
)
def test_when_it_matters(settings: dict[str, Any], keys: bool, loopback: bool, asks: bool) -> None:
    assert asks_for_host(Settings(**settings), keys=keys, loopback=loopback) is asks


@pytest.fixture
def addresses(tmp_path: Path, model_dir: Path) -> Iterator[dict[str, str]]:
    """Of a server on the loopback, and of one like compose's."""
    beyond = {"MEMORYLLM_HOST": "0.0.0.0", "MEMORYLLM_INSECURE": "true"}
    for name in ("own", "wide"):
        (tmp_path / name).mkdir()
    with (
        serving(tmp_path / "own", model_dir) as own,
        serving(tmp_path / "wide", model_dir, **beyond) as wide,
    ):
        for server in (own, wide):
            until(server.ready, "readiness")
        yield {"own": own.url, "wide": wide.url.replace("0.0.0.0", "127.0.0.1")}


def test_a_server_knows_where_it_listens(addresses: dict[str, str]) -> None:
    for name, status in (("own", 403), ("wide", 200)):
        for host, told in (("server:8000", status), ("localhost:8000", 200)):
            answer = httpx.get(f"{addresses[name]}/tenants", headers={"host": host}, trust_env=False)
            assert answer.status_code == told
