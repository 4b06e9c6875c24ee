"""What every store promises, whatever it keeps its bytes in."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from app.errors import ServiceError, TenantExists, TenantNotFound, TenantQuarantined, VersionConflict
from app.store.base import BlobRef, Idempotency, Manifest, Store
from tests.store.conftest import Open


def manifest(tenant: str = "ada", seed: int = 7) -> Manifest:
    return Manifest(tenant=tenant, seed=seed, fingerprint="f" * 64, created=1.5)


def commit(store: Store, version: int, tenant: str = "ada", **more: object) -> Manifest:
    """Commits the block that makes ``version``."""
    data = f"{tenant} block {version}".encode()
    return store.commit(tenant, version - 1, data, time=float(version), tokens=16, **more)  # type: ignore[arg-type]


def key(name: str, index: int = 0, total: int = 1) -> Idempotency:
    return Idempotency(name, index, total, "digest of " + name)


def versions(records: list[object]) -> list[int]:
    return [r.version for r in records]  # type: ignore[attr-defined]


def whole(store: Store, blob: BlobRef, tenant: str = "ada", piece: int = 1000) -> bytes:
    """What ``reader`` gives, in pieces."""
    with store.reader(tenant, blob) as reader:
        pieces = [bytes(reader.take(min(piece, blob.size - at))) for at in range(0, blob.size, piece)]
        reader.finish()
    return b"".join(pieces)


# ---------------------------------------------------------------- creating and loading


def test_nothing_is_there_at_first(store: Store) -> None:
    assert list(store.tenants()) == []
    assert store.load("ada") is None
    assert store.erase("ada") is None


def poured(store: Store, blob: BlobRef) -> bytes:
    """What ``reader`` gives by way of a buffer of its own."""
    found = bytearray()
    with store.reader("ada", blob) as reader:
        reader.pour(found.extend)
    return bytes(found)


@pytest.mark.parametrize("call", ["commit", "compact", "history", "times", "find", "usage", "read", "reader"])
def test_an_absent_tenant_is_not_found(store: Store, call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "commit": lambda: commit(store, 1),
        "compact": lambda: store.compact("ada", 1, b"snapshot"),
        "history": lambda: store.history("ada"),
        "times": lambda: store.times("ada"),
        "find": lambda: store.find("ada", "key"),
        "usage": lambda: store.usage("ada"),
        "read": lambda: store.read("ada", BlobRef("0000000001-0123456789abcdef.block", 1, "00")),
        "reader": lambda: whole(store, BlobRef("0000000001-0123456789abcdef.block", 1, "00")),
    }
    with pytest.raises(TenantNotFound):
        calls[call]()
    assert list(store.tenants()) == []


def test_a_created_tenant_is_there_also_after_reopening(reopen: Open) -> None:
    store = reopen()
    assert store.create(manifest()) == manifest()
    assert store.load("ada") == manifest()
    store = reopen()
    assert store.load("ada") == manifest()
    assert list(store.tenants()) == ["ada"]


def test_creating_twice_is_refused_and_changes_nothing(store: Store) -> None:
    store.create(manifest())
    commit(store, 1)
    with pytest.raises(TenantExists):
        store.create(manifest(seed=8))
    loaded = store.load("ada")
    assert loaded is not None
    assert (loaded.seed, loaded.version) == (7, 1)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "../../etc/passwd",
        "/",
        "user@example.org",
        "Ada",
        "ada ",
        "ÅÄÖ 漢字 🙂",
        "x" * 512,
        "nul",
        "a\\b:c",
    ],
)
def test_any_name_is_a_tenant_of_its_own(reopen: Open, name: str) -> None:
    store = reopen()
    store.create(manifest("ada"))
    store.create(manifest(name))
    commit(store, 1, name)
    store = reopen()
    assert set(store.tenants()) == {"ada", name}
    assert store.load("ada").version == 0  # type: ignore[union-attr]
    assert store.load(name).version == 1  # type: ignore[union-attr]


def test_tenants_are_sorted(store: Store) -> None:
    for name in ("b", "a", "c", "A"):
        store.create(manifest(name))
    assert list(store.tenants()) == ["A", "a", "b", "c"]
    store.erase("a")
    store.create(manifest("B"))
    assert list(store.tenants()) == ["A", "B", "b", "c"]


def test_of_many_tenants_some_are_listed_alone(store: Store) -> None:
    for name in ("b", "acme/2", "acme", "acme/1", "acme0", "ä/1", "ä", "ä/🙂", "z*"):
        store.create(manifest(name))
    for only, there in (
        (["b"], ["b"]),
        (["nobody", "b", "acme"], ["acme", "b"]),
        (["acme/*"], ["acme/1", "acme/2"]),
        (["acme/*", "acme/1", "a*"], ["acme", "acme/1", "acme/2", "acme0"]),
        (["ä/*", "b"], ["b", "ä/1", "ä/🙂"]),
        (["nobody/*", "c", "acm"], []),
        ([], []),
    ):
        assert list(store.tenants(only)) == there, only
    assert list(store.tenants(["*"])) == list(store.tenants())
    store.erase("acme/1")
    assert list(store.tenants(["acme/*", "acme/1"])) == ["acme/2"]


# ---------------------------------------------------------------- committing


def test_commits_come_back_in_order_with_all_they_carry(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    for version in (1, 2, 3):
        returned = commit(store, version, text=f"text {version}", idempotency=key("k", version - 1, 3))
        assert returned == store.load("ada")
        assert returned.version == version
    store = reopen()
    loaded = store.load("ada")
    assert loaded == returned
    assert [store.read("ada", b.blob) for b in loaded.blocks] == [
        f"ada block {v}".encode() for v in (1, 2, 3)
    ]
    assert [(b.version, b.time, b.tokens, b.idempotency) for b in loaded.blocks] == [
        (v, float(v), 16, key("k", v - 1, 3)) for v in (1, 2, 3)
    ]
    assert [r.text for r in store.history("ada")] == ["text 1", "text 2", "text 3"]


@pytest.mark.parametrize("expected", [0, 2, 100])
def test_a_commit_on_another_version_is_refused_and_changes_nothing(reopen: Open, expected: int) -> None:
    store = reopen()
    store.create(manifest())
    before = commit(store, 1)
    usage = store.usage("ada")
    with pytest.raises(VersionConflict):
        commit(store, expected + 1)
    assert store.load("ada") == before
    assert store.usage("ada") == usage
    assert reopen().load("ada") == before


def test_exactly_one_of_many_racing_commits_wins_each_version(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    won: list[tuple[int, bytes]] = []
    lost: list[type[ServiceError]] = []
    barrier = threading.Barrier(4)

    def race(worker: int) -> None:
        for version in range(8):
            barrier.wait()
            data = f"{worker} at {version}".encode()
            try:
                store.commit("ada", version, data, time=0.0, tokens=16)
                won.append((version, data))
            except ServiceError as error:
                lost.append(type(error))
            barrier.wait()

    threads = [threading.Thread(target=race, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(version for version, _ in won) == list(range(8))
    assert lost == [VersionConflict] * 24
    store = reopen()
    loaded = store.load("ada")
    assert loaded is not None
    assert [store.read("ada", b.blob) for b in loaded.blocks] == [data for _, data in sorted(won)]


def test_exactly_one_of_many_racing_creations_wins(store: Store) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def race(seed: int) -> None:
        barrier.wait()
        try:
            store.create(manifest(seed=seed))
            outcomes.append(f"made {seed}")
        except TenantExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=race, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes.count("exists") == 3
    assert f"made {store.load('ada').seed}" in outcomes  # type: ignore[union-attr]


def test_empty_and_large_blobs(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    large = bytes(range(256)) * 4096
    store.commit("ada", 0, b"", time=0.0, tokens=16)
    store.commit("ada", 1, large, time=0.0, tokens=16)
    loaded = reopen().load("ada")
    assert loaded is not None
    store = reopen()
    assert [store.read("ada", b.blob) for b in loaded.blocks] == [b"", large]
    assert store.usage("ada") > len(large)


def test_a_blob_comes_piece_by_piece(store: Store) -> None:
    store.create(manifest())
    data = bytes(range(256)) * 4000
    ref = store.commit("ada", 0, data, time=1.0, tokens=16).blocks[-1].blob
    store.expect("ada", [ref])
    assert whole(store, ref) == whole(store, ref, piece=len(data)) == poured(store, ref) == data
    with store.reader("ada", ref) as reader:
        assert bytes(reader.peek(300_000, 5)) == data[300_000:300_005]
        assert bytes(reader.take(3)) == data[:3]
        assert bytes(reader.peek(len(data) - 1, 1)) == data[-1:]
        for offset, size in ((len(data), 1), (-1, 2), (0, -1)):
            with pytest.raises(TenantQuarantined):
                reader.peek(offset, size)
        # nobody may take a part for all of it
        with pytest.raises(TenantQuarantined):
            reader.finish()
    empty = store.commit("ada", 1, b"", time=2.0, tokens=16).blocks[-1].blob
    assert whole(store, empty) == poured(store, empty) == b""


@pytest.mark.parametrize("begun", [False, True])
def test_a_blob_that_goes_while_it_is_read_is_whole_or_says_so(store: Store, begun: bool) -> None:
    store.create(manifest())
    ref = store.commit("ada", 0, b"x" * 300_000, time=1.0, tokens=16).blocks[-1].blob

    def read() -> bytes:
        with store.reader("ada", ref) as reader:
            pieces = [bytes(reader.take(1000))] if begun else []
            store.compact("ada", 1, b"snapshot")
            pieces.append(bytes(reader.take(ref.size - sum(map(len, pieces)))))
            reader.finish()
            return b"".join(pieces)

    with suppress(VersionConflict):
        assert read() == b"x" * 300_000
    with pytest.raises(VersionConflict):
        whole(store, ref)
    snapshot = store.load("ada").snapshot  # type: ignore[union-attr]
    assert snapshot is not None
    assert whole(store, snapshot.blob) == b"snapshot"
    store.erase("ada")
    with pytest.raises(TenantNotFound):
        whole(store, snapshot.blob)


def test_a_blob_that_is_not_what_its_name_says_is_quarantine(store: Store) -> None:
    store.create(manifest())
    ref = commit(store, 1).blocks[0].blob
    for wrong in (
        BlobRef(ref.name, ref.size + 1, ref.checksum),
        BlobRef(ref.name, ref.size, "0" * len(ref.checksum)),
        BlobRef("../../../FORMAT", ref.size, ref.checksum),
    ):
        with pytest.raises(TenantQuarantined):
            store.read("ada", wrong)
        with pytest.raises(TenantQuarantined):
            whole(store, wrong)
        with pytest.raises(TenantQuarantined):
            poured(store, wrong)
        # a hint harms nobody
        store.expect("ada", [wrong])
        if wrong.size == ref.size:
            with pytest.raises(TenantQuarantined), store.reader("ada", wrong) as reader:
                reader.verify()


# ---------------------------------------------------------------- compaction and the archive


def test_compaction_puts_a_snapshot_in_the_blocks_place(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    for version in (1, 2, 3):
        before = commit(store, version, text=f"text {version}", idempotency=key(f"k{version}"))
    after = store.compact("ada", 2, b"the pool at 2")
    assert after == store.load("ada")
    store = reopen()
    loaded = store.load("ada")
    assert loaded == after
    assert loaded.snapshot is not None
    assert (loaded.version, loaded.snapshot.version) == (3, 2)
    assert store.read("ada", loaded.snapshot.blob) == b"the pool at 2"
    assert loaded.blocks == before.blocks[2:]
    assert store.read("ada", loaded.blocks[0].blob) == b"ada block 3"
    assert versions(store.history("ada")) == [1, 2, 3]
    assert [r.text for r in store.history("ada")] == ["text 1", "text 2", "text 3"]
    assert [versions(store.find("ada", f"k{v}")) for v in (1, 2, 3, 4)] == [[1], [2], [3], []]
    assert commit(store, 4).version == 4


def test_compaction_frees_the_blocks(store: Store) -> None:
    store.create(manifest())
    for version in range(1, 6):
        store.commit("ada", version - 1, b"x" * 10_000, time=0.0, tokens=16)
    old = store.load("ada")
    store.compact("ada", 5, b"y" * 10_000)
    assert store.usage("ada") < 15_000
    assert old is not None
    with pytest.raises(VersionConflict):
        store.read("ada", old.blocks[0].blob)


def test_compacting_beyond_the_version_is_refused(store: Store) -> None:
    store.create(manifest())
    before = commit(store, 1)
    with pytest.raises(VersionConflict):
        store.compact("ada", 2, b"the pool at 2")
    assert store.load("ada") == before


def test_compacting_again_to_the_same_or_an_older_version_does_nothing(store: Store) -> None:
    store.create(manifest())
    for version in (1, 2):
        commit(store, version)
    after = store.compact("ada", 2, b"the pool at 2")
    assert store.compact("ada", 2, b"another") == after
    assert store.compact("ada", 1, b"another") == after
    assert store.compact("ada", 0, b"another") == after
    assert store.load("ada") == after


def test_many_compactions_keep_every_record_in_few_blobs(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    for version in range(1, 25):
        commit(store, version, idempotency=key(f"k{version}"))
        after = store.compact("ada", version, b"pool")
        assert len(after.archive) <= 8
        assert versions(store.history("ada")) == list(range(1, version + 1))
        assert versions(store.find("ada", f"k{(version + 1) // 2}")) == [(version + 1) // 2]
    store = reopen()
    assert versions(store.history("ada")) == list(range(1, 25))
    assert [versions(store.find("ada", f"k{v}")) for v in range(1, 25)] == [[v] for v in range(1, 25)]


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_the_newest_records_are_kept_up_to_the_limit(reopen: Open, limit: int) -> None:
    store = reopen(history_limit=limit)
    store.create(manifest())
    for version in range(1, 24):
        commit(store, version, idempotency=key(f"k{version}"))
        if version % 2 == 0:
            store.compact("ada", version, b"pool")
        # blocks that are still needed are always remembered
        kept = max(limit, version % 2)
        expected = list(range(1, version + 1))[-kept:] if kept else []
        assert versions(store.history("ada")) == expected
        assert store.times("ada") == [float(v) for v in expected]
        assert [v for v in range(1, version + 1) if store.find("ada", f"k{v}")] == expected


# ---------------------------------------------------------------- idempotency keys


def test_a_key_finds_the_blocks_of_its_update_only_in_its_tenant(reopen: Open) -> None:
    store = reopen()
    for name in ("ada", "bob"):
        store.create(manifest(name))
    commit(store, 1, idempotency=key("one"))
    commit(store, 2, idempotency=key("two", 0, 2))
    commit(store, 3, idempotency=key("two", 1, 2))
    commit(store, 4)
    commit(store, 1, "bob", idempotency=key("two"))
    for _ in range(2):
        assert versions(store.find("ada", "two")) == [2, 3]
        assert [r.idempotency for r in store.find("ada", "two")] == [key("two", 0, 2), key("two", 1, 2)]
        assert versions(store.find("bob", "two")) == [1]
        assert store.find("bob", "one") == []
        store.compact("ada", 2, b"pool")
    assert versions(reopen().find("ada", "two")) == [2, 3]


def test_a_new_key_is_found_after_looking_for_it_in_vain(store: Store) -> None:
    store.create(manifest())
    for version in range(1, 12):
        assert store.find("ada", f"k{version}") == []
        commit(store, version, idempotency=key(f"k{version}"))
        assert versions(store.find("ada", f"k{version}")) == [version]
        if version % 3 == 0:
            store.compact("ada", version, b"pool")
            assert versions(store.find("ada", f"k{version}")) == [version]


# ---------------------------------------------------------------- erasing


def test_an_erased_tenant_is_gone_and_can_be_made_anew(reopen: Open) -> None:
    store = reopen()
    for name in ("ada", "bob"):
        store.create(manifest(name))
        for version in (1, 2, 3):
            commit(store, version, name, idempotency=key("k"))
    old = store.compact("ada", 2, b"pool")
    receipt = store.erase("ada")
    assert receipt is not None
    # a snapshot, an archive and a block
    assert (receipt.tenant, receipt.version, receipt.blobs) == ("ada", 3, 3)
    assert receipt.bytes > 0
    assert store.erase("ada") is None
    for _ in range(2):
        assert store.load("ada") is None
        assert list(store.tenants()) == ["bob"]
        with pytest.raises(TenantNotFound):
            store.read("ada", old.blocks[0].blob)
        store = reopen()
    store.create(manifest(seed=9))
    assert store.load("ada") == manifest(seed=9)
    assert store.history("ada") == []
    assert store.find("ada", "k") == []
    new = commit(store, 1)
    assert new.blocks[0].blob.name not in {b.blob.name for b in old.blocks}
    assert store.load("bob").version == 3  # type: ignore[union-attr]


def test_the_key_cache_does_not_outlive_the_tenant(store: Store) -> None:
    for _ in range(3):
        store.create(manifest())
        assert store.find("ada", "k") == []
        commit(store, 1, idempotency=key("k"))
        store.compact("ada", 1, b"pool")
        assert versions(store.find("ada", "k")) == [1]
        store.erase("ada")
