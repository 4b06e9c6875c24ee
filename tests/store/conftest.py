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
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Closes the store that is open and opens it again, with the options given."""
    opened: list[Store] = []
    files = MemoryDisk(tmp_path) if request.param == "memorydisk" else None
    url = request.getfixturevalue("redis_server").url if request.param == "redis" else ""

    def open_again(**options: Any) -> Store:
        close()
        if url:
            opened.append(open_store(url, **options))
        else:
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
