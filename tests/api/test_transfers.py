"""Export and import over HTTP: streamed, bounded, and no file left behind however they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.api import transfers
from app.api.spool import CHUNK
from app.messages import Exported, ExportTenant, GetTenant, ImportTenant, Reply
from app.settings import Settings
from tests.api.conftest import Service, until
from tests.api.fake_worker import MEMORY_FILE
from tests.api.test_access import bearer, start
from tests.api.test_bad_input import check_error

pytestmark = pytest.mark.anyio

Skip = Callable[[float], Awaitable[None]]
OCTETS = {"content-type": "application/octet-stream"}


@pytest.fixture
async def taught(service: Service) -> Service:
    await service.post("/update", {"tenant": "alice", "text": list(range(60))})
    return service


def left(service: Service) -> list[Path]:
    """Files of transfers that still have a name."""
    assert service.settings.spool_dir is not None
    return [path for path in service.settings.spool_dir.glob("*/*") if path.name != "lock"]


def fill(path: str, size: int) -> None:
    Path(path).write_bytes(bytes(size))


class Exchange:
    """One request by hand: what is sent is seen as it comes, and the client can hang up."""

    def __init__(
        self, service: Service, method: str, path: str, headers: dict[str, str] | None = None
    ) -> None:
        self.sent: list[Any] = []
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.flowing = asyncio.Event()
        self.flowing.set()
        raw = path.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "path": raw[0],
            "raw_path": raw[0].encode(),
            "query_string": raw[2].encode(),
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.task = asyncio.create_task(service.app(scope, self.events.get, self._send))

    async def _send(self, message: Any) -> None:
        await self.flowing.wait()
        self.sent.append(message)

    def body(self, data: bytes = b"", more: bool = False) -> None:
        self.events.put_nowait({"type": "http.request", "body": data, "more_body": more})

    async def taken(self) -> None:
        """All of it is, and the next piece waited for; or it never will be."""
        await until(lambda: self.events.empty() or self.task.done())

    def hang_up(self) -> None:
        self.events.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def received(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.sent)


# ---------------------------------------------------------------- export


async def test_an_export_is_the_workers_file(taught: Service) -> None:
    taught.fake.export_bytes = 3 * CHUNK + 17
    answer = await taught.http.get("/tenants/alice/export")
    assert answer.status_code == 200
    assert answer.content.startswith(b"alice 2 False ")
    assert len(answer.content) == 3 * CHUNK + 17 == int(answer.headers["content-length"])
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="memory-2.safetensors"'
    assert answer.headers["x-memory-version"] == "2"
    assert answer.headers["cache-control"] == "no-store"
    assert (await taught.http.get("/tenants/alice/export?texts=true")).content.startswith(b"alice 2 True ")
    assert left(taught) == []
    (directory,) = (taught.settings.spool_dir or Path()).iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700


async def test_exports_that_cannot_be(service: Service) -> None:
    check_error(await service.http.get("/tenants/nobody/export"), 404, "tenant_not_found")
    check_error(await service.http.get("/tenants/alice/export?texts=maybe"), 422, "invalid_request", "texts")
    service.client.detach("gone")
    check_error(await service.http.get("/tenants/alice/export"), 503, "worker_unavailable")
    assert left(service) == []


async def test_a_client_that_hangs_up_takes_its_file_along(taught: Service) -> None:
    taught.fake.memories["holder"] = 1
    exchange = Exchange(taught, "GET", "/tenants/holder/export")
    exchange.body()
    await taught.until_seen(ExportTenant)
    assert len(left(taught)) == 1
    exchange.hang_up()
    await exchange.task
    assert exchange.status == 499
    assert left(taught) == []


async def test_a_client_that_hangs_up_in_the_middle_gets_no_further(taught: Service) -> None:
    taught.fake.export_bytes = 50 * CHUNK
    exchange = Exchange(taught, "GET", "/tenants/alice/export")
    exchange.body()
    await until(lambda: exchange.received >= CHUNK)
    assert left(taught) == [], "a file that is being sent needs no name"
    exchange.hang_up()
    await exchange.task
    assert exchange.received < 50 * CHUNK


async def test_a_client_that_reads_nothing_is_cut_off(
    taught: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "STALLED_SECONDS", 0.02)
    taught.fake.export_bytes = 5 * CHUNK
    exchange = Exchange(taught, "GET", "/tenants/alice/export")
    exchange.body()
    await until(lambda: exchange.received >= CHUNK)
    exchange.flowing.clear()
    await exchange.task
    assert exchange.received < 5 * CHUNK


async def test_a_worker_that_dies_leaves_no_file(taught: Service) -> None:
    taught.fake.memories["holder"] = 1
    waiting = asyncio.create_task(taught.http.get("/tenants/holder/export"))
    await taught.until_seen(ExportTenant)
    taught.client.detach("the worker ended")
    check_error(await waiting, 503, "worker_unavailable")
    assert left(taught) == []


async def test_an_erasure_cuts_off_what_is_being_sent(taught: Service) -> None:
    taught.fake.export_bytes = 50 * CHUNK
    taught.fake.memories["bob"] = 1
    exchanges = [Exchange(taught, "GET", f"/tenants/{name}/export") for name in ("alice", "bob")]
    for exchange in exchanges:
        exchange.body()
    await until(lambda: all(exchange.received >= CHUNK for exchange in exchanges))
    for exchange in exchanges:
        exchange.flowing.clear()
    receipt = (await taught.http.delete("/tenants/alice")).json()
    assert receipt["files"] == 1
    for exchange in exchanges:
        exchange.flowing.set()
        await exchange.task
    assert exchanges[0].received < 50 * CHUNK
    assert exchanges[1].received == 50 * CHUNK, "another tenant's export was cut off"


# ---------------------------------------------------------------- import


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_an_export_can_be_imported(taught: Service) -> None:
    taught.fake.export_bytes = 2 * CHUNK + 1
    file = (await taught.http.get("/tenants/alice/export")).content
    made = await taught.http.post("/tenants/b%2Fc/import", content=file, headers=OCTETS)
    assert made.status_code == 201
    assert (made.json()["id"], made.json()["memory_version"]) == ("b/c", 2)
    assert taught.fake.imported == [file]
    assert left(taught) == []
    # without an announced length, in odd pieces
    pieces = [file[i : i + 99_991] for i in range(0, len(file), 99_991)]
    made = await taught.http.post("/tenants/d/import", content=chunks(*pieces), headers=OCTETS)
    assert made.status_code == 201
    assert taught.fake.imported[1] == file


async def test_imports_that_cannot_be(taught: Service) -> None:
    post = taught.http.post
    check_error(await post("/tenants/x/import", content=b"x", headers=OCTETS), 422, "invalid_memory_file")
    check_error(await post("/tenants/x/import", content=b"", headers=OCTETS), 400, "malformed_body")
    check_error(await post("/tenants/x/import", json={}), 415, "unsupported_media_type")
    packed = OCTETS | {"content-encoding": "gzip"}
    check_error(await post("/tenants/x/import", content=b"x", headers=packed), 415, "unsupported_media_type")
    name = "/tenants/a%0Ab/import"
    check_error(await post(name, content=b"x", headers=OCTETS), 422, "invalid_request", "tenant")
    assert left(taught) == []
    assert "x" not in taught.fake.memories


async def test_an_existing_tenant_is_told_of_before_the_body_is_taken(taught: Service) -> None:
    exchange = Exchange(taught, "POST", "/tenants/alice/import", OCTETS | {"content-length": "1000000"})
    await exchange.task
    assert exchange.status == 409
    assert isinstance(taught.seen[-1], GetTenant)
    assert left(taught) == []


async def test_a_file_larger_than_any_memory_is_refused(service: Service) -> None:
    announced = await service.http.post("/tenants/x/import", content=bytes(MEMORY_FILE + 1), headers=OCTETS)
    check_error(announced, 413, "body_too_large")
    assert service.seen == []
    endless = chunks(*[bytes(CHUNK)] * 100)
    check_error(
        await service.http.post("/tenants/x/import", content=endless, headers=OCTETS), 413, "body_too_large"
    )
    assert not any(isinstance(message, ImportTenant) for message in service.seen)
    assert left(service) == []
    # other bodies keep their own bound, whatever a tenant is called
    most = service.settings.max_body_bytes
    refused = await service.http.post("/tenants/import/fork", content=bytes(most + 1))
    check_error(refused, 413, "body_too_large")


async def test_a_body_that_stops_leaves_nothing(service: Service, pass_time: Skip) -> None:
    exchange = Exchange(service, "POST", "/tenants/x/import", OCTETS)
    exchange.body(bytes(CHUNK), more=True)
    await until(lambda: bool(left(service)) and left(service)[0].stat().st_size == CHUNK)
    exchange.body(b"more", more=True)
    exchange.hang_up()
    await exchange.task
    assert exchange.status == 499
    assert left(service) == []
    exchange = Exchange(service, "POST", "/tenants/x/import", OCTETS)
    exchange.body(b"more", more=True)
    await exchange.taken()
    await pass_time(61.0)
    await until(exchange.task.done)
    assert exchange.status == 408
    assert (b"connection", b"close") in exchange.sent[0]["headers"]
    assert left(service) == []
    assert not any(isinstance(message, ImportTenant) for message in service.seen)


async def test_a_body_that_comes_slowly_does_not_stand_still(service: Service, pass_time: Skip) -> None:
    """A minute anew for each piece, and at 64 KiB/s all that it takes; but a trickle has to end."""
    slow, trickle = (Exchange(service, "POST", f"/tenants/{name}/import", OCTETS) for name in "xy")
    slow.body(b"y 7 ", more=True)
    trickle.body(b"y 7 ", more=True)
    for _ in range(7):
        await slow.taken()
        await trickle.taken()
        await pass_time(12.0)
        slow.body(bytes(CHUNK * 36 // 100), more=True)
        trickle.body(b"y", more=True)
    await until(trickle.task.done)
    assert trickle.status == 408
    assert not slow.task.done()
    slow.body(b"end")
    await until(slow.task.done)
    assert slow.status == 201


async def test_a_piece_has_its_own_minute(service: Service, pass_time: Skip) -> None:
    exchange = Exchange(service, "POST", "/tenants/x/import", OCTETS)
    for piece in (b"y 7 " + bytes(CHUNK * 9 // 10), b"a", b"b"):
        exchange.body(piece, more=True)
        await exchange.taken()
        await pass_time(24.0)
    assert not exchange.task.done()
    exchange.body(b"end")
    await until(exchange.task.done)
    assert exchange.status == 201


async def test_no_key_has_all_places(settings: Settings, model_dir: Path, tmp_path: Path) -> None:
    imports: list[Exchange] = []
    async for service in start(settings.model_copy(update={"max_transfers": 4}), model_dir, tmp_path):
        for number in range(4):
            imports.append(
                Exchange(service, "POST", f"/tenants/team%2F{number}/import", OCTETS | bearer("team"))
            )
            imports[-1].body(b"x", more=True)
        await until(lambda: sum(exchange.task.done() for exchange in imports) == 2)
        refused = [exchange for exchange in imports if exchange.task.done()]
        assert [exchange.status for exchange in refused] == [429, 429]
        assert b"tenant_queue_full" in refused[0].sent[1]["body"]
        other = await service.http.post(
            "/tenants/z/import", content=b"y 7 ", headers=OCTETS | bearer("admin")
        )
        assert other.status_code == 201
        for exchange in imports:
            exchange.hang_up()
            await until(exchange.task.done)
        again = "/tenants/team%2F9/import"
        other = await service.http.post(again, content=b"y 7 ", headers=OCTETS | bearer("team"))
        assert other.status_code == 201


async def test_an_erasure_ends_an_import_that_is_still_coming(service: Service) -> None:
    exchange = Exchange(service, "POST", "/tenants/x/import", OCTETS)
    exchange.body(bytes(CHUNK), more=True)
    await until(lambda: bool(left(service)) and left(service)[0].stat().st_size == CHUNK)
    # it came into being by a request of somebody else
    service.fake.memories["x"] = 0
    assert (await service.http.delete("/tenants/x")).json()["files"] == 1
    assert left(service) == []
    exchange.body(b"x 1 x")
    await exchange.task
    assert exchange.status == 409
    assert "x" not in service.fake.memories


async def test_an_export_of_another_size_than_told_is_cut_off(taught: Service) -> None:
    taught.fake.memories["holder"] = 1
    exchange = Exchange(taught, "GET", "/tenants/holder/export")
    exchange.body()
    sent = await taught.until_seen(ExportTenant)
    assert isinstance(sent, ExportTenant)
    fill(sent.path, 10)
    taught.answer(Reply(sent.id, Exported("holder", 1, 20)))
    await exchange.task
    assert exchange.received == 10
    assert left(taught) == []


async def test_an_erasure_ends_an_import_that_waits_for_the_worker(service: Service) -> None:
    """All of it is there, and two others are in the worker's hands."""
    spool = service.app.state.services.spool
    async with spool.working, spool.working:
        exchange = Exchange(service, "POST", "/tenants/x/import", OCTETS)
        exchange.body(b"x 1 x")
        await until(lambda: bool(left(service)) and left(service)[0].stat().st_size == 5)
        service.fake.memories["x"] = 0
        assert (await service.http.delete("/tenants/x")).json()["files"] == 1
    await exchange.task
    assert exchange.status == 409
    assert not any(isinstance(message, ImportTenant) for message in service.seen)
