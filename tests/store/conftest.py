"""The stores that the contract is tested on: each a function that opens the same store again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.store import ahead, journal
from app.store.base import Store
from app.store.disk import DiskStore
from app.store.url import open_store
from tests.store.memorydisk import MemoryDisk
from tests.store.redisserver import RedisServer

Open = Callable[..., Store]


@pytest.fixture(autouse=True)
def _short_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are full after a few records, so that their ends are met, and cost the disk in memory little."""
    monkeypatch.setattr(journal, "SMALLEST", 2048)
    # and whose files are those that something is in
    monkeypatch.setattr(ahead, "MADE_AT_ONCE", 1)


@pytest.fixture(scope="session")
def redis_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_server(redis_session: RedisServer) -> RedisServer:
    """A server with nothing in it."""
    with redis_session.client() as client:
        client.flushall()
    return redis_session


@pytest.fixture(params=["disk", "memorydisk", "redis"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path | MemoryDisk | RedisServer:
    """What keeps a store's bytes: nothing of a store is in it yet."""
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        assert isinstance(server, RedisServer)
        return server
    return MemoryDisk(tmp_path) if request.param == "memorydisk" else tmp_path


@pytest.fixture
def reopen(home: Path | MemoryDisk | RedisServer, tmp_path: Path) -> Iterator[Open]:
    """Closes the store that is open and opens it again, with the options given."""
    opened: list[Store] = []

    def open_again(**options: Any) -> Store:
        close()
        if isinstance(home, RedisServer):
            opened.append(open_store(home.url, **options))
        else:
            files = home if isinstance(home, MemoryDisk) else None
            opened.append(DiskStore(tmp_path, files=files, patience=0.0, **options))
        return opened[-1]

    def close() -> None:
        while opened:
            opened.pop().close()

    yield open_again
    close()


@pytest.fixture
def store(reopen: Open) -> Store:
    return reopen()


@pytest.fixture
def contents(home: Path | MemoryDisk | RedisServer) -> Callable[[], list[bytes]]:
    """All that whoever gets hold of the disk or the server finds there: contents, names and keys."""

    def look() -> list[bytes]:
        if isinstance(home, RedisServer):
            with home.client() as client:
                return [piece for key in client.keys("*") for piece in (key, *_pieces(client, key))]
        if isinstance(home, MemoryDisk):
            return [piece for path, leaf in home.leaves() for piece in (bytes(path), bytes(leaf.now))]
        files = [path for path in home.rglob("*") if path.is_file()]
        return [piece for path in files for piece in (bytes(path), path.read_bytes())]

    return look


def _pieces(client: Any, key: bytes) -> list[bytes]:
    """The value of a key, whatever its type."""
    kind = client.type(key)
    if kind == b"string":
        return [client.get(key)]
    if kind == b"hash":
        return [piece for pair in client.hgetall(key).items() for piece in pair]
    if kind == b"set":
        return [*client.smembers(key)]
    assert kind == b"zset", kind
    return [*client.zrange(key, 0, -1)]
