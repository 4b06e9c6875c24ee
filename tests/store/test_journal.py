"""The journal beside a manifest: what a commit costs, what crashes and damage leave of it, stores from before it."""

from __future__ import annotations

import errno
import hashlib
import random
from pathlib import Path

import msgspec
import pytest

from app.errors import StoreFailed, StoreFull, TenantQuarantined
from app.store import ahead, journal
from app.store.base import Manifest
from app.store.disk import DiskStore
from app.store.journal import Head
from app.store.records import seal, unseal
from tests.store.memorydisk import Crash, Kept, Leaf, MemoryDisk


def opened(disk: MemoryDisk) -> DiskStore:
    return DiskStore(disk.root, files=disk, patience=0.0)


def with_blocks(root: Path, count: int, tenant: str = "ada") -> tuple[MemoryDisk, DiskStore]:
    disk = MemoryDisk(root)
    store = opened(disk)
    store.create(Manifest(tenant, 7, "f", 0.0))
    commit(store, count, tenant)
    return disk, store


def commit(store: DiskStore, count: int, tenant: str = "ada") -> None:
    for _ in range(count):
        version = version_of(store, tenant)
        store.commit(tenant, version, f"block {version}".encode(), time=0.0, tokens=16, text="words")


def version_of(store: DiskStore, tenant: str = "ada") -> int:
    found = store.load(tenant)
    assert found is not None
    return found.version


def journals(disk: MemoryDisk) -> list[tuple[Path, Leaf]]:
    return [(path, leaf) for path, leaf in disk.leaves() if path.suffix == ".journal"]


AHEAD = 5


@pytest.fixture
def several_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MADE_AT_ONCE", AHEAD)
    monkeypatch.setattr(journal, "SMALLEST", 1 << 16)


@pytest.mark.usefixtures("several_ahead")
def test_a_commit_syncs_its_block_and_the_journal(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 1)
    calls: list[tuple[str, str]] = []
    disk.before = lambda call, path: calls.append((call, path.suffix))
    commit(store, 1)
    both = [("sync", ".block"), ("sync_over", ".journal")]
    assert syncs(calls) == [("sync_directory", ""), *both]
    for _ in range(AHEAD - 1):
        calls.clear()
        commit(store, 1)
        assert syncs(calls) == both
    calls.clear()
    commit(store, 1)
    assert syncs(calls) == [("sync_directory", ""), *both]
    store.close()
    assert version_of(opened(disk.after_crash("synced"))) == 2 + AHEAD


def syncs(calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [call for call in calls if "sync" in call[0] or call[0] == "rename"]


def empty_files(disk: MemoryDisk) -> list[Path]:
    return [path for path, leaf in disk.leaves() if not leaf.now]


@pytest.mark.usefixtures("several_ahead")
def test_files_made_ahead_are_of_one_life_of_the_tenant(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 2)
    assert len(empty_files(disk)) == AHEAD - 1
    assert store.erase("ada").blobs == 2
    store.create(Manifest("ada", 7, "f", 1.0, version=2), b"a pool")
    commit(store, 2)
    assert version_of(store) == 4


@pytest.mark.usefixtures("several_ahead")
def test_files_made_ahead_go_with_a_rollback_and_with_a_start(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 3)
    before = empty_files(disk)
    store.rollback("ada", 1, expected_version=3)
    commit(store, 1)
    assert len(empty_files(disk)) == AHEAD - 1
    assert not {*before} & {*empty_files(disk)}
    store.close()
    store = opened(disk)
    assert version_of(store) == 2
    assert empty_files(disk) == []


@pytest.mark.usefixtures("several_ahead")
def test_files_of_few_tenants_are_kept_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_TENANTS", 2)
    disk, store = with_blocks(tmp_path, 2)
    for tenant in ("bob", "carol"):
        store.create(Manifest(tenant, 7, "f", 0.0))
        commit(store, 2, tenant)
    assert len(empty_files(disk)) == 2 * (AHEAD - 1)
    commit(store, 1)
    assert version_of(store) == 3


@pytest.mark.usefixtures("several_ahead")
def test_where_there_is_room_for_few_files_few_are_made_ahead(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 1)
    made = 0

    def full(call: str, path: Path) -> None:
        nonlocal made
        creates = call == "create" and path.suffix == ".block"
        made += creates
        if creates and made > 2:
            raise OSError(errno.ENOSPC, "no room")

    disk.before = full
    commit(store, 2)
    assert empty_files(disk) == []
    with pytest.raises(StoreFull):
        commit(store, 1)
    assert version_of(store) == 3


def test_a_full_journal_is_folded_into_the_manifest(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 1)
    [(first, _)] = journals(disk)
    while journals(disk)[0][0] == first:
        commit(store, 1)
    assert len(journals(disk)) == 1
    head = next(leaf for path, leaf in disk.leaves() if path.name == "manifest")
    assert unseal(bytes(head.now), Head).manifest.version == version_of(store) > 3
    store.close()
    assert version_of(opened(disk.after_crash("synced"))) == unseal(bytes(head.now), Head).manifest.version


@pytest.mark.parametrize("half", [0, 1])
def test_what_one_half_has_lost_is_in_the_other(tmp_path: Path, half: int) -> None:
    disk, store = with_blocks(tmp_path, 3)
    store.close()
    [(first, leaf)] = journals(disk)
    middle = len(leaf.now) // 2
    leaf.now[half * middle : (half + 1) * middle] = bytes(middle)
    leaf.safe = bytes(leaf.now)
    store = opened(disk)
    assert version_of(store) == 3
    # nothing is appended to a journal of which a half is spoilt
    commit(store, 1)
    [(second, _)] = journals(disk)
    assert second != first
    store.close()
    assert version_of(opened(disk.after_crash("synced"))) == 4


def test_a_record_that_a_crash_has_torn_is_not_believed_and_is_written_over(tmp_path: Path) -> None:
    for seed in range(60):
        disk, store = with_blocks(tmp_path, 2)
        cut = disk.after_crash("all")

        def crash(call: str, path: Path, disk: MemoryDisk = disk, seed: int = seed) -> None:
            nonlocal cut
            if call == "sync_over":
                cut = disk.after_crash(random.Random(seed))
                raise Crash

        disk.before = crash
        with pytest.raises(Crash):
            commit(store, 1)
        store.close()
        store = opened(cut)
        found = version_of(store)
        assert found in {2, 3}
        commit(store, 3)
        store.close()
        store = opened(cut.after_crash("synced"))
        assert version_of(store) == found + 3
        store.close()


@pytest.mark.parametrize("call", ["sync_over", "sync_directory"])
def test_what_a_killed_server_left_unsynced_is_synced_before_it_is_told_of(tmp_path: Path, call: str) -> None:
    """The process dies, the machine lives: the next server sees the change, tells of it, and then the power fails."""
    disk, store = with_blocks(tmp_path, 2 if call == "sync_over" else 0)
    before = version_of(store)
    syncs = 0

    def crash(found: str, path: Path) -> None:
        nonlocal syncs
        syncs += found == call
        # the third sync of the directory, in a first commit, is the one behind the manifest's rename
        if found == call and syncs == (1 if call == "sync_over" else 3):
            raise Crash

    disk.before = crash
    with pytest.raises(Crash):
        commit(store, 1)
    disk.before = lambda call, path: None
    store.close()
    again = opened(disk)
    assert version_of(again) == before + 1
    again.close()
    kinds: list[Kept] = ["synced", random.Random(1), random.Random(2)]
    for kept in kinds:
        last = opened(disk.after_crash(kept))
        assert version_of(last) == before + 1
        last.close()


@pytest.mark.parametrize("does", ["create", "erase"])
def test_a_tenant_that_a_killed_server_made_or_erased_stays_so(tmp_path: Path, does: str) -> None:
    """The rename was not synced: the next server sees it, tells of it, and then the power fails."""
    disk, store = with_blocks(tmp_path, 1)
    tenant = "ada" if does == "erase" else "bob"
    fan = store._home.directory(tenant).parent
    renamed = False

    def crash(call: str, path: Path) -> None:
        nonlocal renamed
        if renamed and call == "sync_directory" and path == fan:
            raise Crash
        renamed |= call == "rename"

    disk.before = crash
    with pytest.raises(Crash):
        store.erase("ada") if does == "erase" else store.create(Manifest("bob", 7, "f", 0.0))
    store.close()
    disk.before = lambda call, path: None
    store = opened(disk)
    if does == "erase":
        assert store.load("ada") is None
    else:
        assert version_of(store, "bob") == 0
        commit(store, 2, "bob")
    store.close()
    store = opened(disk.after_crash("synced"))
    if does == "erase":
        assert store.load("ada") is None
    else:
        assert version_of(store, "bob") == 2
    store.close()


@pytest.mark.parametrize("failing", ["sync_over", "sync_directory"])
def test_a_start_whose_sync_fails_does_not_believe_the_next_one_on_that_journal(
    tmp_path: Path, failing: str
) -> None:
    """A server was killed between a journal's write and its sync, and the disk has trouble when the next one looks."""
    disk, store = with_blocks(tmp_path, 2)

    def crash(call: str, path: Path) -> None:
        if call == "sync_over":
            raise Crash

    disk.before = crash
    with pytest.raises(Crash):
        commit(store, 1)
    store.close()
    disk.before = lambda call, path: None
    [(left, _)] = journals(disk)
    store = opened(disk)
    failures = 0

    def fail_once(call: str, path: Path) -> None:
        nonlocal failures
        if call == failing and path in (left, left.parent) and not failures:
            failures += 1
            raise OSError(errno.EIO, "injected")

    disk.before = fail_once
    with pytest.raises(StoreFailed):
        store.load("ada")
    assert version_of(store) == 3
    # the manifest holds by now itself what was in that journal
    assert left not in [path for path, _ in journals(disk)]
    commit(store, 3)
    store.close()
    assert version_of(opened(disk.after_crash("synced"))) == 6


def test_a_sync_that_failed_is_not_tried_again_on_that_journal(tmp_path: Path) -> None:
    disk, store = with_blocks(tmp_path, 2)
    [(first, _)] = journals(disk)

    def fail(call: str, path: Path) -> None:
        if call == "sync_over":
            raise OSError(5, "injected")

    disk.before = fail
    with pytest.raises(StoreFailed):
        commit(store, 1)
    disk.before = lambda call, path: None
    assert version_of(store) == 2
    assert first not in [path for path, _ in journals(disk)]
    store.close()
    store = opened(disk.after_crash("synced"))
    assert version_of(store) == 2
    commit(store, 1)
    store.close()


@pytest.mark.parametrize("change", ["gone", "cut", "grown", "another's"])
def test_a_journal_that_is_not_the_tenant_s_is_noticed(tmp_path: Path, change: str) -> None:
    disk, store = with_blocks(tmp_path, 2)
    store.create(Manifest("bob", 7, "f", 0.0))
    commit(store, 3, "bob")
    store.close()
    mine, theirs = sorted(journals(disk), key=lambda found: found[0].parent != store._home.directory("ada"))
    folder = disk._folder(mine[0].parent)
    if change == "gone":
        del folder.now[mine[0].name]
    elif change == "cut":
        mine[1].now = mine[1].now[:-1]
    elif change == "grown":
        mine[1].now += b"\0"
    else:
        mine[1].now = bytearray(theirs[1].now)
    store = opened(disk)
    assert version_of(store, "bob") == 3
    with pytest.raises(TenantQuarantined, match="journal"):
        store.load("ada")
    store.close()


def test_a_store_of_format_1_is_read_and_goes_on_as_2(tmp_path: Path) -> None:
    """Manifests without journals; blobs under blake2b."""
    disk, store = with_blocks(tmp_path, 2)
    store.close()
    for path, leaf in list(disk.leaves()):
        if path.name == "FORMAT":
            leaf.now = bytearray(b"memoryllm-store 1\n")
        elif path.name == "manifest":
            head, entries = unseal(bytes(leaf.now), Head), bytes(journals(disk)[0][1].now)
            manifest, _, _ = journal.replayed(head, entries)
            blocks = [
                msgspec.structs.replace(record, blob=msgspec.structs.replace(record.blob, checksum=old))
                for record in manifest.blocks
                for old in [
                    hashlib.blake2b(disk.read(path.parent / record.blob.name), digest_size=16).hexdigest()
                ]
            ]
            leaf.now = bytearray(seal(msgspec.structs.replace(manifest, blocks=tuple(blocks))))
    store = opened(disk)
    assert disk.read(tmp_path / "FORMAT") == b"memoryllm-store 2\n"
    commit(store, 1)
    found = store.load("ada")
    assert found is not None
    assert [bytes(store.read("ada", block.blob)) for block in found.blocks] == [
        b"block 0",
        b"block 1",
        b"block 2",
    ]
    store.close()


def test_journals_have_room_for_records_and_never_much_beside_a_pool() -> None:
    assert journal.size_for(1000) == journal.SMALLEST
    assert journal.size_for(500_000) == 499_712
    assert journal.size_for(1 << 30) == journal.LARGEST
