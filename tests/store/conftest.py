"""The stores that the contract is tested on: each a function that opens the same store again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.store.base import Store
from app.store.disk import DiskStore
from tests.store.memorydisk import MemoryDisk

Open = Callable[..., Store]


@pytest.fixture(params=["disk", "memorydisk"])
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Closes the store that is open and opens it again, with the options given."""
    opened: list[Store] = []
    files = MemoryDisk(tmp_path) if request.param == "memorydisk" else None

    def open_again(**options: Any) -> Store:
        close()
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
