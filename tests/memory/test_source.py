"""Pools out of real stores: what is gathered before anybody has checked it is never a tenant's memory."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from app.store import reading
from app.store.disk import DiskStore
from app.store.files import Source
from tests.fakes import MemoryStore, Piecewise
from tests.harness import Harness, load_backbone
from tests.store.memorydisk import Leaf, MemoryDisk

PROMPT = [5, 6, 7, 8]
TEXT = list(range(3, 35))
BACKBONE = load_backbone("two-adapters")[0]


class Disk(MemoryDisk):
    """Notes what it is told to expect and what was read then."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[tuple[str, str]] = []

    def expect(self, path: Path, size: int) -> None:
        assert size
        self.calls.append(("expected", path.suffix))

    def read_into(self, path: Path, buffer: memoryview, seen: Callable[[memoryview], None]) -> int:
        self.calls.append(("read", path.suffix))
        return super().read_into(path, buffer, seen)

    def source(self, path: Path) -> Source:
        self.calls.append(("read", path.suffix))
        return super().source(path)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """With a tenant of a snapshot and two blocks after it."""
    disk = Disk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    harness = Harness(BACKBONE, store=store, compacted_after=4)
    for number in range(6):
        harness.update("ada", [token + number for token in TEXT])
    manifest = store.load("ada")
    assert manifest is not None
    assert manifest.snapshot is not None
    assert (manifest.snapshot.version, len(manifest.blocks)) == (4, 2)
    store.close()
    return disk


def snapshot_of(disk: MemoryDisk) -> Leaf:
    (leaf,) = (leaf for path, leaf in disk.leaves() if path.suffix == ".snapshot")
    return leaf


@contextmanager
def opened(disk: MemoryDisk) -> Iterator[Harness]:
    store = DiskStore(disk.root, files=disk)
    yield Harness(BACKBONE, store=store, slots=1)
    store.close()


def refused(harness: Harness) -> str:
    """The code of the error that a cold tenant's request is answered with; nothing of it is resident then."""
    request = harness.begin_generate("ada", PROMPT)
    harness.run()
    assert harness.engine.residency.get("ada") is None
    return harness.failure(request).code


def test_a_snapshot_and_what_came_after_it_are_the_pool_that_its_updates_made(disk: Disk) -> None:
    kept = Harness(BACKBONE, store=MemoryStore(), compacted_after=100)
    for number in range(6):
        kept.update("ada", [token + number for token in TEXT])
    pools = []
    with opened(disk) as harness:
        for each in (kept, harness):
            manifest = each.store.load("ada")
            assert manifest is not None
            pools.append(each.engine.residency.pool(manifest))
    assert torch.equal(pools[0].hidden, pools[1].hidden)
    assert torch.equal(pools[0].born, pools[1].born)


def test_the_disk_is_told_what_comes_before_the_first_is_read(disk: Disk) -> None:
    with opened(disk) as harness:
        disk.calls.clear()
        harness.generate("ada", PROMPT)
    files = [".block", ".block", ".snapshot"]
    assert disk.calls == [("expected", name) for name in files] + [("read", name) for name in files]


@pytest.mark.parametrize("part", [100, 1 << 20])
def test_an_altered_byte_of_a_snapshot_never_becomes_memory(
    monkeypatch: pytest.MonkeyPatch, disk: Disk, part: int
) -> None:
    """What is in its place before anybody can know is left there."""
    monkeypatch.setattr(reading, "_POURED", part)
    with opened(disk) as harness:
        expected = harness.generate("ada", PROMPT)
    data = snapshot_of(disk).now
    # the header, vectors that are left and such that are forgotten, the ages behind them
    for at in [0, 9, 60, *range(200, len(data), len(data) // 12), len(data) - 1]:
        with opened(disk) as harness:
            data[at] ^= 4
            assert refused(harness) == "tenant_quarantined", at
            data[at] ^= 4
            assert harness.generate("ada", PROMPT) == expected, at


def test_a_snapshot_that_ends_early_or_late_never_becomes_memory(disk: Disk) -> None:
    leaf = snapshot_of(disk)
    whole = bytes(leaf.now)
    for data in (b"", whole[:100], whole[:-1], whole + b"\0"):
        leaf.now = bytearray(data)
        with opened(disk) as harness:
            assert refused(harness) == "tenant_quarantined"


def test_a_disk_that_fails_in_the_middle_of_a_snapshot_is_the_stores_failure(
    monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    class Failing(Piecewise):
        def read_at(self, buffer: memoryview, offset: int) -> int:
            if offset:
                raise OSError(errno.EIO, "injected")
            return super().read_at(buffer[:1000], offset)

    with opened(disk) as harness:
        expected = harness.generate("ada", PROMPT)
    with opened(disk) as harness:
        with monkeypatch.context() as broken:
            broken.setattr(disk, "source", lambda path: Failing(disk.read(path)))
            assert refused(harness) == "store_failed"
        assert harness.generate("ada", PROMPT) == expected
