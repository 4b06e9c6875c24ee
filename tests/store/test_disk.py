"""What only the disk store has: an owner, a format, a key, a layout, limits and threads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import app.store.names
from app.errors import StoreFailed, StoreFull, TenantNotFound, VersionConflict
from app.store import archive
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest
from app.store.disk import DiskStore
from app.store.home import Home
from app.store.url import open_store
from tests.store.memorydisk import MemoryDisk

KEY = bytes(range(32))


def manifest(tenant: str = "ada") -> Manifest:
    return Manifest(tenant, 7, "f", 0.0)


def commit(store: DiskStore, version: int, tenant: str = "ada", text: str | None = None) -> Manifest:
    mark = Idempotency(f"k{version}", 0, 1, "d")
    return store.commit(tenant, version - 1, b"block", time=0.0, tokens=16, text=text, idempotency=mark)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


# ---------------------------------------------------------------- owner and format

OPENING = """
import sys
from pathlib import Path
from app.errors import StoreFailed
from app.store.disk import DiskStore
try:
    DiskStore(Path(sys.argv[1]), patience=0.0)
except StoreFailed as error:
    sys.exit(error.message)
"""


def test_a_store_has_one_owner_across_processes(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    refused = python(OPENING, str(tmp_path / "store"))
    assert refused.returncode == 1
    assert "another server has the store" in refused.stderr
    with pytest.raises(StoreFailed, match="another server"):
        DiskStore(tmp_path / "store", patience=0.0)
    store.close()
    assert python(OPENING, str(tmp_path / "store")).returncode == 0


def test_the_next_owner_waits_for_a_dying_one(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    timer = threading.Timer(0.2, store.close)
    timer.start()
    DiskStore(tmp_path, patience=30.0).close()
    timer.join()


def test_a_lock_is_let_go_while_somebody_else_has_its_file_open(tmp_path: Path) -> None:
    """As a process does that looks through /proc, or a child that was forked and has not come to its exec."""
    store = DiskStore(tmp_path)
    theirs = os.dup(store._home._lock)
    try:
        store.close()
        DiskStore(tmp_path, patience=0.0).close()
    finally:
        os.close(theirs)


def test_a_closed_store_refuses_everything(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, files=MemoryDisk(tmp_path))
    ref = None
    store.create(manifest())
    ref = commit(store, 1).blocks[0].blob
    store.close()
    store.close()
    for call in (
        lambda: store.load("ada"),
        lambda: commit(store, 2),
        lambda: store.read("ada", ref),
        lambda: store.erase("ada"),
        lambda: store.create(manifest("bob")),
    ):
        with pytest.raises(StoreFailed, match="closed"):
            call()


def test_closing_waits_for_a_commit_under_way(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    store.create(manifest())
    writing, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def pause(call: str, path: Path) -> None:
        if call == "rename":
            writing.set()
            assert go_on.wait(10)

    disk.before = pause
    committing = threading.Thread(target=lambda: commit(store, 1))
    committing.start()
    assert writing.wait(10)
    closing = threading.Thread(target=lambda: (store.close(), closed.set()))
    closing.start()
    assert not closed.wait(0.1)
    with pytest.raises(StoreFailed, match="another server"):
        DiskStore(tmp_path, files=disk, patience=0.0)
    go_on.set()
    closing.join(10)
    committing.join(10)
    assert closed.is_set()
    disk.before = lambda call, path: None
    store = DiskStore(tmp_path, files=disk)
    assert store.load("ada").version == 1  # type: ignore[union-attr]
    store.close()


def test_an_unknown_format_is_refused_and_left_alone(tmp_path: Path) -> None:
    DiskStore(tmp_path).close()
    (tmp_path / "FORMAT").write_text("memoryllm-store 3\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreFailed, match="memoryllm-store 3"):
        DiskStore(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_directory_with_other_things_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreFailed, match="not a store"):
        DiskStore(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    with pytest.raises(StoreFailed):
        DiskStore(tmp_path / "thesis.txt")


# ---------------------------------------------------------------- layout


def test_no_path_carries_a_tenant_s_name_and_nobody_else_may_read(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "store")
    store.create(manifest("user@example.org"))
    commit(store, 1, "user@example.org")
    store.close()
    paths = list((tmp_path / "store").rglob("*"))
    assert len(paths) > 8
    for path in paths:
        assert "user" not in str(path.relative_to(tmp_path))
        assert path.stat().st_mode & 0o077 == 0


def test_opening_reads_one_small_file_per_tenant(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    for number in range(500):
        store.create(manifest(f"tenant {number}"))
        store.commit(f"tenant {number}", 0, b"block", time=0.0, tokens=16)
    store.close()
    disk.reads.clear()
    store = DiskStore(tmp_path, files=disk)
    assert len(list(store.tenants())) == 500
    store.close()
    assert [path.name for path in disk.reads if path.name != "name"] == ["FORMAT"]
    assert len(disk.reads) == 501


def test_names_are_put_in_order_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for name in ("bob", "ada"):
        store.create(manifest(name))
    listed = store._names.all()
    store.load("bob")
    store.load("nobody")
    assert store._names.all() is listed
    store.create(manifest("eve"))
    assert store._names.all() == ["ada", "bob", "eve"]
    assert listed == ["ada", "bob"]
    store.close()


def test_strangers_in_the_store_are_ignored(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.create(manifest())
    store.close()
    (tmp_path / "tenants" / ".DS_Store").write_text("x")
    (tmp_path / "tenants" / "ab").mkdir(exist_ok=True)
    (tmp_path / "tenants" / "ab" / "notes").write_text("x")
    (tmp_path / "trash" / "stray").write_text("x")
    store = DiskStore(tmp_path)
    assert list(store.tenants()) == ["ada"]
    store.close()


def test_a_new_key_and_the_times_cost_no_reading_of_the_archive(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    store.create(manifest())
    for version in range(1, 7):
        commit(store, version)
        store.compact("ada", version, b"pool")
    assert store.find("ada", "new") == []
    disk.reads.clear()
    for number in range(20):
        assert store.find("ada", f"new {number}") == []
        assert store.times("ada") == [0.0] * 6
    assert disk.reads == []
    assert len(store.find("ada", "k2")) == 1
    store.close()


def full_archive(number: int, segments: int = 1) -> Manifest:
    refs = tuple(BlobRef(f"{number}-{segment}.archive", 1, "") for segment in range(segments))
    return Manifest(f"tenant {number}", 1, "f", 0.0, archive=refs)


def test_two_thousand_full_archives_are_known_at_once_and_no_more_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [
        BlockRecord(v, BlobRef("", 0, ""), float(v), 16, None, Idempotency(f"key {v}", 0, 1, ""))
        for v in range(2300)
    ]
    index, read = archive.ArchiveIndex(), 0

    def reading() -> list[BlockRecord]:
        nonlocal read
        read += 1
        return records

    assert index.may_hold(full_archive(0, 8), "key 2299", reading)
    assert not index.may_hold(full_archive(0, 8), "another", reading)
    assert list(index.times(full_archive(0, 8), reading)) == [record.time for record in records]
    assert read == 1
    assert 2000 * index._bytes < archive._CACHED_BYTES <= 64 * 2**20
    monkeypatch.setattr(archive, "_CACHED_BYTES", 4 * index._bytes)
    for number in range(10):
        index.times(full_archive(number, 8), reading)
    assert [*index._known] == [f"tenant {number}" for number in range(6, 10)]
    # of an archive that has become another
    index.times(full_archive(9), reading)
    assert sum(known.bytes for known in index._known.values()) == index._bytes


def test_no_lock_outlives_its_use(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, files=MemoryDisk(tmp_path))
    for number in range(100):
        assert store.load(f"nobody {number}") is None
    assert store._locks._entries == {}
    store.close()


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        DiskStore(tmp_path, text_key=bytes(length))


# ---------------------------------------------------------------- a real full disk

FILLING = """
import resource, sys
from pathlib import Path
from app.errors import StoreFull
from app.store.base import Manifest
from app.store.disk import DiskStore
root = Path(sys.argv[1])
store = DiskStore(root)
store.create(Manifest("ada", 7, "f", 0.0))
store.commit("ada", 0, b"small", time=0.0, tokens=16)
before = sorted(p for p in root.rglob("*") if p.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
for change in (lambda: store.commit("ada", 1, bytes(200_000), time=0.0, tokens=16),
               lambda: store.commit("ada", 1, b"x", time=0.0, tokens=16, text="x" * 200_000),
               lambda: store.compact("ada", 1, bytes(200_000))):
    try:
        change()
    except StoreFull:
        pass
    else:
        sys.exit("not full")
    assert sorted(p for p in root.rglob("*") if p.stat().st_size) == before
    manifest = store.load("ada")
    assert manifest.version == 1 and store.read("ada", manifest.blocks[0].blob) == b"small"
assert store.commit("ada", 1, b"small again", time=0.0, tokens=16).version == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert store.compact("ada", 2, bytes(200_000)).snapshot.version == 2
store.close()
assert DiskStore(root).load("ada").version == 2
"""


def test_a_file_that_may_not_grow_changes_nothing(tmp_path: Path) -> None:
    done = python(FILLING, str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_way_of_being_full_is_said_so(tmp_path: Path, number: int) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)

    def full(call: str, path: Path) -> None:
        raise OSError(number, os.strerror(number))

    disk.before = full
    with pytest.raises(StoreFull):
        store.create(manifest())
    store.close()


# ---------------------------------------------------------------- threads


class Pause:
    """Holds the first call ``call`` on a path that ends in ``suffix`` until told to go on."""

    def __init__(self, disk: MemoryDisk, call: str, suffix: str, below: Path | None = None) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self._wanted, self._below = (call, suffix), below
        disk.before = self

    def __call__(self, call: str, path: Path) -> None:
        if (call, path.suffix) != self._wanted or self.reached.is_set():
            return
        if self._below is None or path.is_relative_to(self._below):
            self.reached.set()
            assert self.go_on.wait(10)


def test_a_slow_commit_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    for tenant in ("ada", "bob"):
        store.create(manifest(tenant))
    pause = Pause(disk, "sync", ".block", store._home.directory("ada"))
    slow = threading.Thread(target=lambda: commit(store, 1))
    slow.start()
    assert pause.reached.wait(10)
    done = threading.Event()

    def others() -> None:
        commit(store, 1, "bob")
        store.history("bob")
        store.create(manifest("carol"))
        store.erase("bob")
        # a reader of the same tenant sees what is durable now
        assert store.load("ada").version == 0  # type: ignore[union-attr]
        done.set()

    thread = threading.Thread(target=others)
    thread.start()
    assert done.wait(10)
    assert slow.is_alive()
    pause.go_on.set()
    slow.join(10)
    thread.join(10)
    assert store.load("ada").version == 1  # type: ignore[union-attr]
    store.close()


def compact_while(store: DiskStore, disk: MemoryDisk, meanwhile: object) -> list[object]:
    """Compacts ada to version 2, and calls ``meanwhile`` while the snapshot is being written."""
    outcome: list[object] = []
    pause = Pause(disk, "sync", ".snapshot")

    def compact() -> None:
        try:
            outcome.append(store.compact("ada", 2, b"the pool at 2"))
        except (VersionConflict, TenantNotFound, StoreFailed) as error:
            outcome.append(error)

    thread = threading.Thread(target=compact)
    thread.start()
    assert pause.reached.wait(10)
    meanwhile()  # type: ignore[operator]
    pause.go_on.set()
    thread.join(10)
    return outcome


@pytest.fixture
def two_blocks(tmp_path: Path) -> tuple[DiskStore, MemoryDisk]:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    store.create(manifest())
    for version in (1, 2):
        commit(store, version)
    return store, disk


def test_commits_go_on_while_a_snapshot_is_written(two_blocks: tuple[DiskStore, MemoryDisk]) -> None:
    store, disk = two_blocks
    (after,) = compact_while(store, disk, lambda: [commit(store, v) for v in (3, 4)])
    assert isinstance(after, Manifest)
    assert after == store.load("ada")
    assert (after.version, [b.version for b in after.blocks]) == (4, [3, 4])
    assert after.snapshot is not None
    assert store.read("ada", after.snapshot.blob) == b"the pool at 2"
    store.close()


def test_a_sweep_spares_the_snapshot_being_written(two_blocks: tuple[DiskStore, MemoryDisk]) -> None:
    store, disk = two_blocks

    def forget_and_load() -> None:
        store._manifests.forget("ada")
        assert store.load("ada") is not None

    (after,) = compact_while(store, disk, forget_and_load)
    assert isinstance(after, Manifest)
    assert after.snapshot is not None
    assert store.read("ada", after.snapshot.blob) == b"the pool at 2"
    store.close()


def test_a_tenant_erased_while_his_snapshot_is_written_stays_erased(
    two_blocks: tuple[DiskStore, MemoryDisk],
) -> None:
    store, disk = two_blocks
    (error,) = compact_while(store, disk, lambda: store.erase("ada"))
    assert isinstance(error, TenantNotFound)
    assert store.load("ada") is None
    store.close()


def test_a_snapshot_of_a_former_life_is_not_taken(two_blocks: tuple[DiskStore, MemoryDisk]) -> None:
    store, disk = two_blocks

    def live_again() -> None:
        store.erase("ada")
        store.create(manifest())
        for version in (1, 2, 3):
            commit(store, version)

    (error,) = compact_while(store, disk, live_again)
    assert isinstance(error, VersionConflict | StoreFailed)
    loaded = store.load("ada")
    assert loaded is not None
    assert loaded.snapshot is None
    assert [store.read("ada", b.blob) for b in loaded.blocks] == [b"block"] * 3
    assert not [path for path, _ in disk.leaves() if path.suffix == ".snapshot"]
    store.close()


# ---------------------------------------------------------------- URLs


def test_stores_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for url, expected in (
        (f"disk://{tmp_path}/a", "a"),
        ("disk://./b", "b"),
        ("disk://~/c", "home/c"),
        (str(tmp_path / "d"), "d"),
        ("e/f", "e/f"),
    ):
        open_store(url).close()
        assert (tmp_path / expected / "FORMAT").is_file()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket", "unknown store s3"),
        ("disk://", "names no directory"),
        ("disk://memories", "disk:///absolute"),
    ],
)
def test_a_url_that_cannot_be_used_says_why(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_store(url)


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A closed store of eight tenants, more than are read at once."""
    store = DiskStore(tmp_path)
    for number in range(8):
        store.create(manifest(f"tenant {number}"))
    store.close()
    monkeypatch.setattr(app.store.names, "_READ_AT_ONCE", 3)
    return tmp_path


def test_many_names_are_read_beside_the_start_and_none_is_missing(
    eight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    read = Home.name

    def slow(self: Home, id: str) -> str | None:
        assert go.wait(30)
        return read(self, id)

    monkeypatch.setattr(Home, "name", slow)
    store = DiskStore(eight)
    # the store is open, and no name has been read
    store.erase("tenant 3")
    store.create(manifest("another"))
    store.erase("tenant 5")
    store.create(manifest("tenant 5"))
    go.set()
    assert list(store.tenants()) == ["another", *(f"tenant {n}" for n in (0, 1, 2, 4, 5, 6, 7))]
    store.close()


def test_a_store_that_is_closed_while_names_are_read_waits_for_no_more_of_them(
    eight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    closing = threading.Event()

    def slow(self: Home, id: str) -> str | None:
        read.append(id)
        assert closing.wait(30)
        return None

    monkeypatch.setattr(Home, "name", slow)
    store = DiskStore(eight)
    store._names._closed = True
    closing.set()
    store.close()
    assert len(read) <= 2
    with pytest.raises(StoreFailed):
        store.tenants()
