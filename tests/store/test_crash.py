"""The process dies, or a call fails, at every single file-system call; what was acknowledged is compared.

A script of operations runs on a disk in memory beside a model of what was acknowledged. The disk is then found
as three kinds of crash leave it. Nothing acknowledged may be missing, nothing half-done may show, and nothing
that was shown may go away in a crash.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import app.store.archive
from app.errors import ServiceError, StoreFailed, StoreFull
from app.store.base import Idempotency, Manifest, Store
from app.store.disk import DiskStore
from tests.store.memorydisk import Crash, Folder, Kept, MemoryDisk

KEPT: tuple[Kept, ...] = ("synced", "names", "all")

# a memory is the list of its blocks' contents; a tenant's blocks differ from those of his former life
Memories = dict[str, tuple[str, ...]]


class Step:
    """One operation on one tenant, on the store and on the model alike."""

    def __init__(self, does: str, tenant: str, version: int = 0, life: int = 1) -> None:
        self.does, self.tenant, self.version, self.life = does, tenant, version, life

    def __repr__(self) -> str:
        return f"{self.does} {self.tenant} {self.version}"

    def content(self, version: int) -> str:
        return f"<{self.tenant}-{self.life}-{version}>" * 30

    def on_store(self, store: Store) -> None:
        if self.does == "create":
            store.create(Manifest(self.tenant, self.life, "fingerprint", 0.0))
        elif self.does == "commit":
            mark = Idempotency(f"key {self.version}", 0, 1, "digest")
            data = self.content(self.version).encode()
            store.commit(
                self.tenant, self.version - 1, data, time=0.0, tokens=16, text="text", idempotency=mark
            )
        elif self.does == "compact":
            pool = "|".join(self.content(v) for v in range(1, self.version + 1))
            store.compact(self.tenant, self.version, pool.encode())
        else:
            assert store.erase(self.tenant) is not None

    def on_model(self, memories: Memories) -> Memories:
        after = dict(memories)
        if self.does == "create":
            after[self.tenant] = ()
        elif self.does == "commit":
            after[self.tenant] = (*after[self.tenant], self.content(self.version))
        elif self.does == "erase":
            del after[self.tenant]
        return after


SCRIPT = [
    Step("create", "ada"),
    Step("commit", "ada", 1),
    Step("create", "bob"),
    Step("commit", "ada", 2),
    Step("compact", "ada", 1),
    Step("commit", "ada", 3),
    Step("compact", "ada", 3),
    Step("commit", "ada", 4),
    Step("commit", "bob", 1),
    Step("compact", "ada", 4),
    Step("erase", "ada"),
    Step("create", "ada", life=2),
    Step("commit", "ada", 1, life=2),
    Step("erase", "bob"),
]
TENANTS = ("ada", "bob")


@pytest.fixture(autouse=True)
def _merge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.store.archive, "MOST_SEGMENTS", 2)


def open_store(disk: MemoryDisk) -> DiskStore:
    return DiskStore(disk.root, files=disk, patience=0.0)


def observe(store: Store) -> Memories:
    """All that a reader can see, with the store's own consistency checked on the way."""
    seen: Memories = {}
    for tenant in TENANTS:
        manifest = store.load(tenant)
        if manifest is None:
            continue
        contents: list[str] = []
        if manifest.snapshot is not None:
            contents = store.read(tenant, manifest.snapshot.blob).decode().split("|")
        contents += [store.read(tenant, block.blob).decode() for block in manifest.blocks]
        assert len(contents) == manifest.version
        assert [r.version for r in store.history(tenant)] == list(range(1, manifest.version + 1))
        for version in range(1, manifest.version + 2):
            assert len(store.find(tenant, f"key {version}")) == (version <= manifest.version)
        seen[tenant] = tuple(contents)
    assert list(store.tenants()) == sorted(seen)
    return seen


def check_clean(disk: MemoryDisk, store: Store) -> None:
    """Nothing lies in the store that nobody names."""
    named = set()
    for tenant in TENANTS:
        manifest = store.load(tenant)
        if manifest is not None:
            refs = [b.blob for b in manifest.blocks] + list(manifest.archive)
            refs += [manifest.snapshot.blob] if manifest.snapshot is not None else []
            named |= {ref.name for ref in refs} | {f"name of {tenant}", f"manifest of {tenant}"}
    found = [path for path, _ in disk.leaves() if path.parent != disk.root]
    assert len(found) == len(named), found
    for name in ("staging", "trash"):
        folder = disk.folder.now[name]
        assert isinstance(folder, Folder)
        assert not folder.now


def check_found(disk: MemoryDisk, allowed: list[Memories], erased: list[str]) -> None:
    """Opens the store that a crash has left; works on with it; and does so again after another crash."""
    store = open_store(disk)
    found = observe(store)
    assert found in allowed
    check_clean(disk, store)
    for content in erased:
        assert not any(content.encode() in bytes(leaf.now) for _, leaf in disk.leaves())
    for tenant in TENANTS:
        if tenant not in found:
            Step("create", tenant, life=3).on_store(store)
        done = found.get(tenant, ())
        step = Step("commit", tenant, len(done) + 1, life=3)
        step.on_store(store)
        found[tenant] = (*done, step.content(len(done) + 1))
    store.close()
    store = open_store(disk.after_crash("synced"))
    assert observe(store) == found
    store.close()


def count_calls(disk: MemoryDisk) -> Callable[[], int]:
    calls: list[str] = []
    disk.before = lambda call, path: calls.append(call)
    return lambda: len(calls)


def whole_run(root: Path) -> tuple[int, Memories]:
    disk = MemoryDisk(root)
    counted = count_calls(disk)
    store, memories = open_store(disk), Memories()
    for step in SCRIPT:
        step.on_store(store)
        memories = step.on_model(memories)
        assert observe(store) == memories
        check_clean(disk, store)
    store.close()
    return counted(), memories


def test_the_script_without_a_failure(tmp_path: Path) -> None:
    calls, memories = whole_run(tmp_path)
    assert calls > 150
    assert [len(m) for m in memories.values()] == [1]


@pytest.mark.parametrize(
    "kept", [*KEPT, *map(random.Random, range(3))], ids=[*KEPT, *(f"random {seed}" for seed in range(3))]
)
def test_a_crash_at_every_call_loses_nothing_acknowledged(tmp_path: Path, kept: Kept) -> None:
    calls, _ = whole_run(tmp_path)
    for number in range(calls):
        disk = MemoryDisk(tmp_path)
        left = number

        def crash(call: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        disk.before = crash
        allowed: list[Memories] = [{}]
        erased: list[str] = []
        store = None
        try:
            store = open_store(disk)
            for step in SCRIPT:
                allowed = [allowed[-1], step.on_model(allowed[-1])]
                step.on_store(store)
                if step.does == "erase":
                    erased += allowed[0][step.tenant]
                allowed = allowed[1:]
        except Crash:
            if store is not None:
                store.close()
        else:
            pytest.fail("nothing crashed")
        check_found(disk.after_crash(kept), allowed, erased)


FAILURES = [
    ("before", errno.EIO, "StoreFailed"),
    ("after", errno.EIO, "StoreFailed"),
    ("before", errno.ENOSPC, "StoreFull"),
]


@pytest.mark.parametrize(("moment", "number", "expected"), FAILURES)
def test_a_failure_at_every_call_is_reported_and_got_over(
    tmp_path: Path, moment: str, number: int, expected: str
) -> None:
    calls, final = whole_run(tmp_path)
    kinds = set()
    for failing in range(calls):
        disk = MemoryDisk(tmp_path)
        store = None
        left = failing

        def fail(call: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(number, "injected", str(path))

        setattr(disk, moment, fail)
        while store is None:
            try:
                store = open_store(disk)
            except (StoreFailed, StoreFull):
                assert left < 0
        memories: Memories = {}
        for step in SCRIPT:
            after = step.on_model(memories)
            try:
                step.on_store(store)
            except (StoreFailed, StoreFull) as error:
                assert left < 0
                kinds.add(type(error).__name__)
                seen = observe(store)
                check_seen(seen, memories, None if isinstance(error, StoreFull) else after)
                # what a reader has been shown after a failure must not go away again
                shown = open_store_elsewhere(disk.after_crash("synced"))
                assert seen == shown, (failing, step)
                if seen != after or step.does in {"compact", "erase"}:
                    again(step, store)
            assert observe(store) == after, (failing, step)
            memories = after
        store.close()
        assert left < 0
        found = disk.after_crash("synced")
        store = open_store(found)
        assert observe(store) == final
        check_clean(found, store)
        store.close()
    assert expected in kinds
    assert moment == "before" or "StoreFull" not in kinds


def check_seen(seen: Memories, before: Memories, after: Memories | None) -> None:
    assert seen == before or (after is not None and seen == after)


def again(step: Step, store: Store) -> None:
    """The retry of a step that failed. An erasure that was complete but for its report finds nothing."""
    try:
        step.on_store(store)
    except AssertionError:
        assert step.does == "erase"


def open_store_elsewhere(disk: MemoryDisk) -> Memories:
    """What another process would see on a copy of the disk, the lock apart."""
    elsewhere = disk.root / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    store = open_store(MemoryDisk(elsewhere, disk.folder))
    try:
        return observe(store)
    finally:
        store.close()


@pytest.mark.parametrize("step", SCRIPT, ids=repr)
def test_a_full_disk_changes_nothing_and_leaves_everything_readable(tmp_path: Path, step: Step) -> None:
    """Every call that needs room fails, from some call on, for the length of an operation."""
    position, needed = SCRIPT.index(step), 0
    while True:
        disk = MemoryDisk(tmp_path)
        store, memories = open_store(disk), Memories()
        for earlier in SCRIPT[:position]:
            earlier.on_store(store)
            memories = earlier.on_model(memories)
        before = sorted(str(path) for path, _ in disk.leaves())
        left = needed

        def full(call: str, path: Path) -> None:
            nonlocal left
            if call in {"create", "write", "sync", "make_directory", "rename"}:
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, "injected", str(path))

        disk.before = full
        try:
            step.on_store(store)
        except StoreFull:
            assert observe(store) == memories
            assert sorted(str(path) for path, _ in disk.leaves()) == before
        else:
            assert left >= 0
            store.close()
            break
        disk.before = lambda call, path: None
        step.on_store(store)
        assert observe(store) == step.on_model(memories)
        store.close()
        needed += 1
    assert needed > 0


def test_an_unknown_outcome_stays_hidden_until_it_is_durable(tmp_path: Path) -> None:
    """The directory's sync fails after the manifest's rename, and goes on failing."""
    disk = MemoryDisk(tmp_path)
    store = open_store(disk)
    SCRIPT[0].on_store(store)
    directory = next(path.parent for path, _ in disk.leaves() if path.name == "manifest")
    renamed = False

    def fail(call: str, path: Path) -> None:
        nonlocal renamed
        renamed |= call == "rename"
        if renamed and call == "sync_directory" and path == directory:
            raise OSError(errno.EIO, "injected", str(path))

    disk.before = fail
    with pytest.raises(StoreFailed):
        SCRIPT[1].on_store(store)
    for call in (store.load, store.history, store.usage):
        with pytest.raises(ServiceError) as caught:
            call("ada")
        assert caught.type is StoreFailed
    disk.before = lambda call, path: None
    seen = observe(store)
    store.close()
    found = open_store(disk.after_crash("synced"))
    assert observe(found) == seen
    found.close()
