"""What only the disk store has to say of forks and rollbacks: links, damage, encryption, and threads."""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from app.errors import ServiceError, StoreFailed, TenantExists, TenantQuarantined, VersionConflict
from app.store.base import Manifest, Store
from app.store.disk import DiskStore
from app.store.files import Disk
from app.store.lineages import blobs_of
from tests.store.memorydisk import Folder, Leaf, MemoryDisk
from tests.store.test_disk import KEY, compact_while
from tests.store.test_lineages import begin, blocks, contents, keys, manifest, size, texts


def files_of(store: DiskStore, tenant: str) -> list[Path]:
    found = store.load(tenant)
    assert found is not None
    return [store._home.directory(tenant) / ref.name for ref in blobs_of(found)]


def forked(store: Store) -> Manifest:
    """ada with a snapshot, an archive and two blocks; bob is her fork."""
    begin(store, 4)
    store.compact("ada", 2, b"the pool at 2")
    return store.fork("ada", "bob", created=1.0)


def check_fork(store: Store) -> None:
    assert contents(store, "bob") == [b"the pool at 2", *blocks(3, 4)]
    assert texts(store, "bob") == [f"text {v}" for v in range(1, 5)]
    assert keys(store, "bob") == [1, 2, 3, 4]


# ---------------------------------------------------------------- links


def test_a_fork_shares_the_blobs_on_the_disk_under_names_of_its_own(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    forked(store)
    ada, bob = files_of(store, "ada"), files_of(store, "bob")
    # all but the archive, whose texts are sealed anew
    assert [os.path.samefile(*pair) for pair in zip(ada, bob, strict=True)] == [True, True, True, False]
    assert not {path.name for path in ada} & {path.name for path in bob}
    # of the same version and kind
    assert [(p.name[:11], p.suffix) for p in ada] == [(p.name[:11], p.suffix) for p in bob]
    store.erase("ada")
    assert [path.stat().st_nlink for path in bob] == [1, 1, 1, 1]
    store.close()
    store = DiskStore(tmp_path)
    check_fork(store)
    store.close()


class WithoutLinks(Disk):
    def __init__(self, number: int) -> None:
        self.number = number

    def link(self, source: Path, target: Path) -> None:
        raise OSError(self.number, os.strerror(self.number), str(target))


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_hard_links_a_fork_is_a_copy(tmp_path: Path, number: int) -> None:
    store = DiskStore(tmp_path, files=WithoutLinks(number))
    forked(store)
    ada, bob = files_of(store, "ada"), files_of(store, "bob")
    assert not any(os.path.samefile(*pair) for pair in zip(ada, bob, strict=True))
    store.erase("ada")
    check_fork(store)
    store.close()


def test_a_link_that_fails_otherwise_fails_the_fork(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, files=WithoutLinks(errno.EIO))
    with pytest.raises(StoreFailed):
        forked(store)
    assert list(store.tenants()) == ["ada"]
    assert os.listdir(tmp_path / "staging") == []
    store.close()


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("what", ["removed", "cut"])
@pytest.mark.parametrize("suffix", ["", ".block", ".snapshot", ".archive"])
def test_a_tenant_in_quarantine_is_not_forked(tmp_path: Path, suffix: str, what: str, links: bool) -> None:
    disk = MemoryDisk(tmp_path, links=links)
    store = DiskStore(tmp_path, files=disk)
    begin(store, 4)
    store.compact("ada", 2, b"the pool at 2")
    directory = store._home.directory("ada")
    store.close()
    folder = disk._folder(directory)
    name = next(n for n in folder.now if Path(n).suffix == suffix and n != "name")
    leaf = folder.now[name]
    assert isinstance(leaf, Leaf)
    if what == "cut":
        del leaf.now[-1]
    else:
        del folder.now[name]
    before = [path for path, _ in disk.leaves()]
    store = DiskStore(tmp_path, files=disk)
    with pytest.raises(TenantQuarantined):
        store.fork("ada", "bob", created=1.0)
    assert list(store.tenants()) == ["ada"]
    assert store.load("bob") is None
    assert [path for path, _ in disk.leaves()] == before
    staging = disk.folder.now["staging"]
    assert isinstance(staging, Folder)
    assert not staging.now
    store.close()


def test_a_damaged_shared_blob_concerns_those_who_share_it_and_nobody_else(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    forked(store)
    store.fork("ada", "carol", version=3, created=1.0)
    begin(store, 1, "dora")
    shared = files_of(store, "bob")[2]
    shared.write_bytes(b"x" * shared.stat().st_size)
    for tenant in ("ada", "bob"):
        with pytest.raises(TenantQuarantined):
            contents(store, tenant)
    # the block that carol does not share, being older
    assert contents(store, "carol") == [b"the pool at 2", *blocks(3, 3)]
    assert contents(store, "dora") == blocks(1, 1, "dora")
    assert store.erase("bob") is not None
    store.close()


def test_a_copy_of_a_damaged_blob_is_not_made(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path, links=False)
    store = DiskStore(tmp_path, files=disk)
    begin(store, 1)
    next(leaf for path, leaf in disk.leaves() if path.suffix == ".block").now[0] ^= 1
    with pytest.raises(TenantQuarantined):
        store.fork("ada", "bob", created=1.0)
    assert store.load("bob") is None
    store.close()


def test_a_tenant_in_quarantine_is_neither_rolled_back_nor_rebuilt(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    old = begin(store, 2)
    store.close()
    next(leaf for path, leaf in disk.leaves() if path.name == "manifest").now[50] ^= 1
    before = {path: bytes(leaf.now) for path, leaf in disk.leaves()}
    store = DiskStore(tmp_path, files=disk)
    with pytest.raises(TenantQuarantined):
        store.rollback("ada", 1, expected_version=2)
    with pytest.raises(TenantQuarantined):
        store.replace("ada", old, manifest(), None, ())
    with pytest.raises(TenantQuarantined):
        store.claim("ada")
    assert {path: bytes(leaf.now) for path, leaf in disk.leaves()} == before
    store.close()


# ---------------------------------------------------------------- texts


def test_a_fork_s_texts_are_encrypted_anew(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk, text_key=KEY)
    forked(store)
    sealed = {
        tenant: {block.text for block in found.blocks if block.text}
        for tenant in ("ada", "bob")
        if (found := store.load(tenant)) is not None
    }
    assert len(sealed["ada"]) == len(sealed["bob"]) == 2
    assert not sealed["ada"] & sealed["bob"]
    store.erase("ada")
    check_fork(store)
    store.compact("bob", 4, b"pool")
    assert texts(store, "bob") == [f"text {v}" for v in range(1, 5)]
    old = store.load("bob")
    assert old is not None
    store.replace("bob", old, Manifest("bob", 1, "g", 0.0, version=4), b"pool", store.history("bob"))
    store.fork("bob", "carol", created=1.0)
    for tenant in ("bob", "carol"):
        assert texts(store, tenant) == [f"text {v}" for v in range(1, 5)]
    store.close()
    assert not [path for path, leaf in disk.leaves() if b"text 1" in bytes(leaf.now)]


def test_a_store_that_keeps_no_texts_forks_none(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk, text_key=KEY)
    begin(store, 3)
    store.compact("ada", 1, b"the pool at 1")
    store.close()
    store = DiskStore(tmp_path, files=disk, keep_text=False)
    store.fork("ada", "bob", created=1.0)
    assert texts(store, "bob") == [None, None, None]
    assert keys(store, "bob") == [1, 2, 3]
    store.close()
    store = DiskStore(tmp_path, files=disk, text_key=KEY)
    assert texts(store, "ada") == ["text 1", "text 2", "text 3"]
    store.close()


# ---------------------------------------------------------------- threads


def test_all_forks_take_two_tenants_locks_in_one_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, files=MemoryDisk(tmp_path))
    for tenant in ("ada", "bob"):
        begin(store, 1, tenant)
    taken: list[str] = []
    holding = store._locks.holding

    def recording(tenant: str) -> AbstractContextManager[None]:
        taken.append(tenant)
        return holding(tenant)

    monkeypatch.setattr(store._locks, "holding", recording)
    for tenant, target in (("ada", "bob"), ("bob", "ada")):
        with pytest.raises(TenantExists):
            store.fork(tenant, target, created=1.0)
    assert taken == ["ada", "bob"] * 2
    store.close()


@pytest.mark.parametrize("change", ["rollback to 1", "rollback to 2", "replace", "rollback and commit"])
def test_a_snapshot_that_another_lineage_overtakes_is_not_taken(tmp_path: Path, change: str) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    old = begin(store, 3)

    def meanwhile() -> None:
        if change == "replace":
            store.replace("ada", old, Manifest("ada", 8, "g", 1.5), None, ())
            return
        store.rollback("ada", 2 if change == "rollback to 2" else 1, expected_version=3)
        if change == "rollback and commit":
            store.commit("ada", 1, b"another 2", time=0.0, tokens=16)

    (error,) = compact_while(store, disk, meanwhile)
    assert isinstance(error, VersionConflict)
    assert not [path for path, _ in disk.leaves() if path.suffix == ".snapshot"]
    expected = {
        "rollback to 1": blocks(1, 1),
        "rollback to 2": blocks(1, 2),
        "replace": [],
        "rollback and commit": [*blocks(1, 1), b"another 2"],
    }
    assert contents(store) == expected[change]
    assert size(store.load("ada"))[0] == 1
    store.close()


def test_a_fork_and_a_compaction_do_not_disturb_each_other(tmp_path: Path) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    begin(store, 3)
    (after,) = compact_while(store, disk, lambda: store.fork("ada", "bob", created=1.0))
    assert not isinstance(after, ServiceError)
    assert contents(store, "ada") == [b"the pool at 2", *blocks(3, 3)]
    assert contents(store, "bob") == blocks(1, 3)
    store.close()
    store = DiskStore(tmp_path, files=disk)
    assert contents(store, "ada") == [b"the pool at 2", *blocks(3, 3)]
    assert contents(store, "bob") == blocks(1, 3)
    store.close()
