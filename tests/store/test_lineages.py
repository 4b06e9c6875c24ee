"""What every store promises of imports, forks, rollbacks and rebuilds."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from app.errors import TenantExists, TenantNotFound, VersionConflict, VersionNotKept
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Snapshot, Store
from app.store.lineages import UNDONE_FOR, undone
from app.store.records import checksum, seal, unseal
from tests.store.conftest import Open
from tests.store.test_contract import commit, key, manifest, versions

GONE = BlobRef("0000000001-0123456789abcdef.block", 1, "00")


def record(version: int, text: str | None = None, mark: Idempotency | None = None) -> BlockRecord:
    return BlockRecord(version, GONE, float(version), 16, text, mark)


def begin(store: Store, blocks: int, tenant: str = "ada") -> Manifest:
    """A tenant with blocks, each with a text and a key of its own."""
    made = store.create(manifest(tenant))
    for version in range(1, blocks + 1):
        made = commit(store, version, tenant, text=f"text {version}", idempotency=key(f"k{version}"))
    return made


def contents(store: Store, tenant: str = "ada") -> list[bytes]:
    """The snapshot's bytes and the blocks'."""
    found = store.load(tenant)
    assert found is not None
    refs = [] if found.snapshot is None else [found.snapshot.blob]
    return [bytes(store.read(tenant, ref)) for ref in [*refs, *(block.blob for block in found.blocks)]]


def blocks(first: int, last: int, tenant: str = "ada") -> list[bytes]:
    return [f"{tenant} block {version}".encode() for version in range(first, last + 1)]


def texts(store: Store, tenant: str = "ada") -> list[str | None]:
    return [r.text for r in store.history(tenant)]


def keys(store: Store, tenant: str = "ada", most: int = 9) -> list[int]:
    """The versions whose keys are found."""
    return [v for v in range(1, most + 1) if versions(store.find(tenant, f"k{v}")) == [v]]


def size(found: Manifest | None) -> tuple[int, int]:
    assert found is not None
    return found.lineage, found.version


# ---------------------------------------------------------------- claims


def test_a_claim_gives_the_manifest_as_it_is(store: Store) -> None:
    assert store.claim("ada") is None
    begin(store, 2)
    assert store.claim("ada") == store.load("ada")
    assert store.claimed("ada")
    assert commit(store, 3).version == 3
    store.release("ada")
    store.release("nobody")
    assert store.claim("ada") == store.load("ada")


# ---------------------------------------------------------------- imports


def test_an_imported_memory_begins_with_its_snapshot_and_records(reopen: Open) -> None:
    store = reopen()
    given = msgspec.structs.replace(manifest(), version=7)
    records = [record(2, "two", key("k2")), record(5), record(7, "seven", key("k7"))]
    made = store.create(given, b"the pool at 7", records)
    assert made == store.load("ada")
    assert (made.version, made.seed, made.lineage, made.blocks) == (7, 7, 0, ())
    store = reopen()
    assert store.load("ada") == made
    assert contents(store) == [b"the pool at 7"]
    assert store.history("ada") == records
    assert keys(store) == [2, 7]
    commit(store, 8, text="eight", idempotency=key("k8"))
    store.compact("ada", 8, b"the pool at 8")
    assert versions(store.history("ada")) == [2, 5, 7, 8]
    assert texts(store) == ["two", None, "seven", "eight"]
    assert keys(store) == [2, 7, 8]
    with pytest.raises(VersionNotKept):
        store.rollback("ada", 7, expected_version=8)


@pytest.mark.parametrize("version", [0, 3])
def test_an_imported_memory_may_have_no_records(reopen: Open, version: int) -> None:
    store = reopen()
    made = store.create(msgspec.structs.replace(manifest(), version=version), b"pool")
    assert made.snapshot is not None
    assert made.snapshot.version == version
    store = reopen()
    assert store.load("ada") == made
    assert contents(store) == [b"pool"]
    assert store.history("ada") == []
    commit(store, version + 1)
    assert contents(store) == [b"pool", *blocks(version + 1, version + 1)]


def test_an_import_over_a_tenant_is_refused_and_changes_nothing(store: Store) -> None:
    begin(store, 2)
    before, usage = store.load("ada"), store.usage("ada")
    with pytest.raises(TenantExists):
        store.create(msgspec.structs.replace(manifest(), version=7), b"pool", [record(1)])
    assert store.load("ada") == before
    assert (keys(store), store.usage("ada")) == ([1, 2], usage)


@pytest.mark.parametrize("limit", [0, 2])
def test_an_import_keeps_its_newest_records_up_to_the_limit(reopen: Open, limit: int) -> None:
    store = reopen(history_limit=limit)
    records = [record(v, f"text {v}", key(f"k{v}")) for v in range(1, 6)]
    store.create(msgspec.structs.replace(manifest(), version=5), b"pool", records)
    assert store.history("ada") == records[5 - limit :]
    assert keys(store) == list(range(6 - limit, 6))
    many = [record(v, "text" * 10) for v in range(1, 201)]
    store.create(msgspec.structs.replace(manifest("bob"), version=200), b"pool", many)
    assert store.usage("bob") < 200 * 40


IMPOSSIBLE: list[tuple[dict[str, Any], bytes | None, Sequence[BlockRecord]]] = [
    ({"version": 1}, None, ()),
    ({"version": -1}, b"pool", ()),
    ({}, None, [record(1)]),
    ({"version": 2}, None, [record(1)]),
    ({"version": 2}, b"pool", [record(3)]),
    ({"version": 2}, b"pool", [record(0)]),
    ({"version": 2}, b"pool", [record(2), record(1)]),
    ({"version": 2}, b"pool", [record(1), record(1)]),
    ({"version": 2, "snapshot": Snapshot(2, GONE)}, b"pool", ()),
    ({"version": 1, "blocks": (record(1),)}, b"pool", ()),
    ({"archive": (GONE,)}, None, ()),
]


@pytest.mark.parametrize(("changes", "snapshot", "records"), IMPOSSIBLE)
def test_a_beginning_that_cannot_be_is_the_callers_mistake(
    store: Store, changes: dict[str, Any], snapshot: bytes | None, records: Sequence[BlockRecord]
) -> None:
    wrong = msgspec.structs.replace(manifest(), **changes)
    with pytest.raises(ValueError, match=r"begins|rise in version"):
        store.create(wrong, snapshot, records)
    assert list(store.tenants()) == []
    old = begin(store, 1)
    with pytest.raises(ValueError, match=r"begins|rise in version"):
        store.replace("ada", old, wrong, snapshot, records)
    assert store.load("ada") == old


# ---------------------------------------------------------------- forks


def test_a_fork_has_the_memory_and_the_history_and_a_life_of_its_own(reopen: Open) -> None:
    store = reopen()
    begin(store, 5)
    source = store.compact("ada", 3, b"the pool at 3")
    fork = store.fork("ada", "bob", created=9.5)
    assert fork == store.load("bob")
    assert (fork.tenant, fork.created, fork.seed, fork.fingerprint) == ("bob", 9.5, 7, "f" * 64)
    assert size(fork) == (0, 5)
    store = reopen()
    assert store.load("bob") == fork
    assert store.load("ada") == source
    assert list(store.tenants()) == ["ada", "bob"]
    for name in ("ada", "bob"):
        assert contents(store, name) == [b"the pool at 3", *blocks(4, 5)]
        assert versions(store.history(name)) == [1, 2, 3, 4, 5]
        assert texts(store, name) == [f"text {v}" for v in range(1, 6)]
        assert keys(store, name) == [1, 2, 3, 4, 5]
        assert [r.time for r in store.history(name)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    commit(store, 6, "bob", idempotency=key("k6"))
    assert keys(store, "bob") == [1, 2, 3, 4, 5, 6]
    assert keys(store, "ada") == [1, 2, 3, 4, 5]
    assert store.load("ada") == source
    commit(store, 6, "ada")
    assert contents(store, "ada") == [b"the pool at 3", *blocks(4, 6)]
    assert contents(store, "bob") == [b"the pool at 3", *blocks(4, 5), *blocks(6, 6, "bob")]


@pytest.mark.parametrize("changed", ["ada", "bob"])
@pytest.mark.parametrize("change", ["compact", "rollback", "replace", "erase"])
def test_whatever_becomes_of_one_the_other_stays_whole(reopen: Open, changed: str, change: str) -> None:
    store = reopen()
    begin(store, 5)
    store.compact("ada", 2, b"the pool at 2")
    store.fork("ada", "bob", created=9.5)
    other = "bob" if changed == "ada" else "ada"
    untouched = store.load(other)
    old = store.load(changed)
    assert old is not None
    if change == "compact":
        store.compact(changed, 5, b"the pool at 5")
    elif change == "rollback":
        store.rollback(changed, 2, expected_version=5)
    elif change == "replace":
        store.replace(changed, old, manifest(changed), None, ())
    else:
        store.erase(changed)
    for _ in range(2):
        assert store.load(other) == untouched
        assert contents(store, other) == [b"the pool at 2", *blocks(3, 5)]
        assert texts(store, other) == [f"text {v}" for v in range(1, 6)]
        assert keys(store, other) == [1, 2, 3, 4, 5]
        store = reopen()


def test_a_fork_at_an_older_version_ends_there(reopen: Open) -> None:
    store = reopen()
    begin(store, 6)
    store.compact("ada", 2, b"the pool at 2")
    for version in (2, 4):
        fork = store.fork("ada", f"at {version}", version=version, created=9.5)
        assert size(fork) == (0, version)
        assert contents(store, f"at {version}") == [b"the pool at 2", *blocks(3, version)]
        assert versions(store.history(f"at {version}")) == list(range(1, version + 1))
        assert keys(store, f"at {version}") == list(range(1, version + 1))
    assert keys(store) == [1, 2, 3, 4, 5, 6]
    store = reopen()
    assert contents(store, "at 4") == [b"the pool at 2", *blocks(3, 4)]
    commit(store, 5, "at 4", idempotency=key("k5"))
    assert keys(store, "at 4") == [1, 2, 3, 4, 5]


def test_a_fork_of_an_empty_memory_and_of_a_fork(store: Store) -> None:
    begin(store, 0)
    assert size(store.fork("ada", "bob", created=1.0)) == (0, 0)
    commit(store, 1, "bob", text="text 1", idempotency=key("k1"))
    store.compact("bob", 1, b"the pool at 1")
    store.fork("bob", "carol", created=2.0)
    store.erase("bob")
    store.fork("carol", "bob", created=3.0)
    assert contents(store, "bob") == [b"the pool at 1"]
    assert (texts(store, "bob"), keys(store, "bob")) == (["text 1"], [1])
    assert contents(store, "ada") == []


@pytest.mark.parametrize("version", [-1, 0, 1, 5, 100])
def test_a_version_that_is_not_kept_can_be_neither_forked_nor_gone_back_to(
    store: Store, version: int
) -> None:
    begin(store, 4)
    before = store.compact("ada", 2, b"the pool at 2")
    with pytest.raises(VersionNotKept):
        store.fork("ada", "bob", version=version, created=1.0)
    with pytest.raises(VersionNotKept):
        store.rollback("ada", version, expected_version=4)
    assert list(store.tenants()) == ["ada"]
    assert store.load("ada") == before
    assert store.load("bob") is None
    assert store.create(manifest("bob")).version == 0


def test_a_fork_of_a_memory_that_was_rolled_back_begins_a_lineage_of_its_own(store: Store) -> None:
    begin(store, 3)
    store.rollback("ada", 1, expected_version=3)
    commit(store, 2, text="other")
    assert size(store.fork("ada", "bob", created=1.0)) == (0, 2)
    assert texts(store, "bob") == ["text 1", "other"]
    assert keys(store, "bob") == [1]


def test_a_fork_needs_a_source_and_a_name_that_is_free(store: Store) -> None:
    with pytest.raises(TenantNotFound):
        store.fork("ada", "bob", created=1.0)
    with pytest.raises(TenantNotFound):
        store.fork("ada", "ada", created=1.0)
    begin(store, 1)
    before = begin(store, 2, "bob")
    for target in ("ada", "bob"):
        with pytest.raises(TenantExists):
            store.fork("ada", target, created=1.0)
    assert store.load("bob") == before
    assert list(store.tenants()) == ["ada", "bob"]


def test_forks_in_both_directions_at_once_do_not_wait_for_each_other(store: Store) -> None:
    for name in ("a", "b"):
        begin(store, 2, name)
    lost: list[str] = []

    def fork(source: str, target: str) -> None:
        for _ in range(20):
            with pytest.raises(TenantExists):
                store.fork(source, target, created=1.0)
        lost.append(target)

    threads = [threading.Thread(target=fork, args=pair, daemon=True) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(lost) == ["a", "b"]


def test_exactly_one_of_many_racing_forks_wins(store: Store) -> None:
    outcomes: list[str] = []
    for name in ("a", "b", "c", "d"):
        begin(store, 2, name)
    barrier = threading.Barrier(4)

    def race(source: str) -> None:
        barrier.wait()
        try:
            store.fork(source, "new", created=1.0)
            outcomes.append(source)
        except TenantExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=race, args=(name,)) for name in ("a", "b", "c", "d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (winner,) = [source for source in outcomes if source != "exists"]
    assert len(outcomes) == 4
    assert contents(store, "new") == blocks(1, 2, winner)


# ---------------------------------------------------------------- rollbacks


@pytest.mark.parametrize("to", [2, 3, 5])
def test_a_rollback_forgets_what_came_later(reopen: Open, to: int) -> None:
    store = reopen()
    begin(store, 5)
    before = store.compact("ada", 2, b"the pool at 2")
    usage = store.usage("ada")
    after = store.rollback("ada", to, expected_version=5)
    assert after == store.load("ada")
    assert size(after) == (1, to)
    for _ in range(2):
        assert contents(store) == [b"the pool at 2", *blocks(3, to)]
        assert versions(store.history("ada")) == list(range(1, to + 1))
        assert keys(store) == list(range(1, to + 1))
        assert (store.usage("ada") < usage) == (to < 5)
        for block in before.blocks[to - 2 :]:
            with pytest.raises(VersionConflict):
                store.read("ada", block.blob)
        store = reopen()
    # a key of a block that is gone is as good as new
    commit(store, to + 1, text="other", idempotency=key("k5" if to < 5 else "k6"))
    assert size(store.load("ada")) == (1, to + 1)
    assert texts(store) == [*(f"text {v}" for v in range(1, to + 1)), "other"]
    store.compact("ada", to + 1, b"another pool")
    assert texts(store) == [*(f"text {v}" for v in range(1, to + 1)), "other"]
    assert contents(reopen()) == [b"another pool"]


def test_a_rollback_to_the_very_beginning(store: Store) -> None:
    begin(store, 3)
    assert size(store.rollback("ada", 0, expected_version=3)) == (1, 0)
    assert (contents(store), store.history("ada"), keys(store)) == ([], [], [])
    commit(store, 1)
    assert size(store.rollback("ada", 0, expected_version=1)) == (2, 0)


def test_times_of_what_was_rolled_back_are_kept_for_a_day(reopen: Open) -> None:
    store = reopen()
    store.create(manifest())
    for version, time in ((1, 10.0), (2, 20.0), (3, 30.0)):
        store.commit("ada", version - 1, b"x", time=time, tokens=16)
    assert undone(store.rollback("ada", 1, expected_version=3)) == (20.0, 30.0)
    store.commit("ada", 1, b"x", time=40.0, tokens=16)
    store.compact("ada", 2, b"snapshot")
    fork = store.fork("ada", "bob", created=1.0)
    assert undone(fork) == ()
    store = reopen()
    old = store.load("ada")
    assert old is not None
    assert undone(old) == (20.0, 30.0)
    new = Manifest("ada", 8, "other", 1.5)
    assert undone(store.replace("ada", old, new, None, [])) == (20.0, 30.0)
    store.commit("ada", 0, b"x", time=UNDONE_FOR + 20.0, tokens=16)
    assert undone(store.rollback("ada", 0, expected_version=1)) == (30.0, UNDONE_FOR + 20.0)
    for _ in range(3):
        store.rollback("ada", 0, expected_version=0)
    assert undone(reopen().load("ada")) == (30.0, UNDONE_FOR + 20.0)  # type: ignore[arg-type]


def test_a_manifest_is_sealed_to_what_older_servers_have_stored() -> None:
    """A swap in Redis compares the seal of the manifest that it read with what is there."""
    before = (
        b'{"tenant":"ada","seed":7,"fingerprint":"f","created":1.5,"version":0,"snapshot":null,"blocks":[],'
        b'"archive":[],"format":1,"lineage":0}'
    )
    stored = checksum(before).encode() + b"\n" + before
    assert seal(unseal(stored, Manifest)) == stored


def test_a_rollback_of_another_version_is_refused(store: Store) -> None:
    with pytest.raises(TenantNotFound):
        store.rollback("ada", 0, expected_version=0)
    before = begin(store, 3)
    for expected in (0, 2, 4):
        with pytest.raises(VersionConflict):
            store.rollback("ada", 1, expected_version=expected)
    assert store.load("ada") == before
    store.rollback("ada", 1, expected_version=3)
    # the same once more, because its answer was lost
    with pytest.raises(VersionConflict):
        store.rollback("ada", 1, expected_version=3)


def test_what_was_made_in_another_lineage_is_refused(store: Store) -> None:
    begin(store, 3)
    store.rollback("ada", 1, expected_version=3)
    for version in (2, 3):
        commit(store, version, lineage=1)
    before = store.load("ada")
    with pytest.raises(VersionConflict):
        commit(store, 4, lineage=0)
    with pytest.raises(VersionConflict):
        store.compact("ada", 3, b"a pool with the old blocks 2 and 3", lineage=0)
    assert store.load("ada") == before
    assert size(store.compact("ada", 3, b"pool", lineage=1)) == (1, 3)
    assert size(commit(store, 4, lineage=1)) == (1, 4)


def test_keys_that_the_limit_hid_are_found_again_as_history_shows_them(reopen: Open) -> None:
    store = reopen(history_limit=4)
    begin(store, 6)
    store.compact("ada", 3, b"the pool at 3")
    assert versions(store.history("ada")) == keys(store) == [3, 4, 5, 6]
    store.rollback("ada", 3, expected_version=6)
    # the archive may hold more than is shown beside many blocks
    assert versions(store.history("ada")) == keys(store)
    assert keys(store)[-1] == 3


# ---------------------------------------------------------------- rebuilds


def test_what_an_erased_memory_had_under_way_is_refused_by_its_successor(store: Store) -> None:
    old = begin(store, 3)
    assert store.erase("ada") is not None
    store.create(msgspec.structs.replace(manifest(), created=old.created + 1))
    for version in (1, 2, 3):
        commit(store, version)
    with pytest.raises(VersionConflict, match="made anew"):
        commit(store, 4, lineage=0, created=old.created)
    with pytest.raises(VersionConflict, match="made anew"):
        store.compact("ada", 3, b"the old memory's pool", lineage=0, created=old.created)
    with pytest.raises(VersionConflict, match="made anew"):
        store.rollback("ada", 1, expected_version=3, lineage=0, created=old.created)
    with pytest.raises(VersionConflict, match="rolled back or rebuilt"):
        store.rollback("ada", 1, expected_version=3, lineage=1)
    assert size(store.load("ada")) == (0, 3)
    assert size(commit(store, 4, lineage=0, created=old.created + 1)) == (0, 4)


def test_a_replaced_memory_is_another_in_the_next_lineage(reopen: Open) -> None:
    store = reopen()
    begin(store, 5)
    old = store.compact("ada", 3, b"the pool at 3")
    new = Manifest("ada", 8, "g" * 64, 1.5, version=2)
    after = store.replace("ada", old, new, b"another pool", [record(1, "one"), record(2, "two", key("k2"))])
    assert after == store.load("ada")
    assert (size(after), after.seed, after.fingerprint) == ((1, 2), 8, "g" * 64)
    store = reopen()
    assert store.load("ada") == after
    assert contents(store) == [b"another pool"]
    assert texts(store) == ["one", "two"]
    assert keys(store) == [2]
    assert old.snapshot is not None
    for ref in (old.snapshot.blob, old.blocks[0].blob, old.archive[0] if old.archive else old.blocks[1].blob):
        with pytest.raises(VersionConflict):
            store.read("ada", ref)
    commit(store, 3)
    assert contents(store) == [b"another pool", *blocks(3, 3)]


def test_a_memory_that_has_changed_is_not_replaced(store: Store) -> None:
    new = Manifest("ada", 8, "g" * 64, 1.5)
    with pytest.raises(TenantNotFound):
        store.replace("ada", new, new, None, ())
    old = begin(store, 3)
    commit(store, 4)
    with pytest.raises(VersionConflict):
        store.replace("ada", old, new, None, ())
    back = store.rollback("ada", 3, expected_version=4)
    with pytest.raises(VersionConflict):
        store.replace("ada", old, new, None, ())
    # a compaction is no change
    store.compact("ada", 2, b"the pool at 2")
    assert size(store.replace("ada", back, new, None, ())) == (2, 0)
    assert contents(store) == []
    store.erase("ada")
    store.create(Manifest("ada", 9, "f" * 64, 2.5, lineage=2))
    with pytest.raises(VersionConflict):
        store.replace("ada", msgspec.structs.replace(new, lineage=2), new, None, ())
    with pytest.raises(ValueError, match="tenant"):
        store.replace("ada", new, manifest("bob"), None, ())


# ---------------------------------------------------------------- races


def test_rollbacks_compactions_and_commits_at_once_never_mix(reopen: Open) -> None:
    """Every block says which block it follows, every snapshot which block it ends with."""
    store = reopen()
    store.create(manifest())
    done: list[str] = []

    def last_of(found: Manifest) -> bytes:
        if found.blocks:
            return bytes(store.read("ada", found.blocks[-1].blob))
        return b"start" if found.snapshot is None else bytes(store.read("ada", found.snapshot.blob))

    def race(worker: int) -> None:
        draw = random.Random(worker)
        for step in range(40):
            found = store.load("ada")
            assert found is not None
            try:
                last = last_of(found).split(b"<")[0]
                does = draw.choice(["commit", "commit", "commit", "rollback", "compact"])
                if does == "commit":
                    data = f"{worker}-{step}<".encode() + last
                    store.commit("ada", found.version, data, time=0.0, tokens=16, lineage=found.lineage)
                elif does == "rollback":
                    to = found.snapshot.version if found.snapshot is not None else 0
                    store.rollback("ada", draw.randint(to, found.version), expected_version=found.version)
                elif found.blocks:
                    store.compact("ada", found.version, last, lineage=found.lineage)
                done.append(does)
            except (VersionConflict, VersionNotKept):
                # another was faster, maybe a compaction that left the version and not what is before it
                done.append("conflict")

    threads = [threading.Thread(target=race, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 120
    for _ in range(2):
        found = store.load("ada")
        assert found is not None
        assert found.lineage == done.count("rollback")
        previous = contents(store)[0] if found.snapshot is not None else b"start"
        for block in found.blocks:
            name, follows = bytes(store.read("ada", block.blob)).split(b"<")
            assert follows == previous
            previous = name
        assert versions(store.history("ada")) == list(range(1, found.version + 1))
        store = reopen()
