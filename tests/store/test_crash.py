"""The process dies, or a call fails, at every single file-system call; what was acknowledged is compared.

A script of operations runs on a disk in memory beside a model of what was acknowledged. The disk is then found
as three kinds of crash leave it. Nothing acknowledged may be missing, nothing half-done may show, and nothing
that was shown may go away in a crash.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import NamedTuple

import pytest

import app.store.archive
from app.errors import ServiceError, StoreFailed, StoreFull
from app.store.base import Store
from tests.faults.model import TENANTS, Memories, Memory, Step, check_clean, observe, open_store
from tests.store.memorydisk import Crash, Kept, MemoryDisk

KEPT: tuple[Kept, ...] = ("synced", "names", "all")


UPDATES = [
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
FORKS = [
    Step("create", "ada"),
    Step("commit", "ada", 1),
    Step("commit", "ada", 2),
    Step("compact", "ada", 1),
    Step("fork", "ada", 2, target="bob"),
    Step("compact", "bob", 2),
    Step("fork", "ada", 1, target="carol"),
    Step("erase", "ada"),
    Step("commit", "carol", 2),
]
LINEAGES = [
    Step("import", "ada", 1),
    Step("commit", "ada", 2),
    Step("commit", "ada", 3),
    Step("compact", "ada", 2),
    Step("rollback", "ada", 2),
    Step("commit", "ada", 3, life=2),
    Step("replace", "ada", 1, life=3),
    Step("commit", "ada", 2, life=3),
    Step("rollback", "ada", 2),
    Step("erase", "ada"),
    Step("import", "ada", 2, life=4),
]


class Script(NamedTuple):
    """Operations, and whether the disk that they run on has hard links."""

    steps: list[Step]
    links: bool = True

    def disk(self, root: Path) -> MemoryDisk:
        return MemoryDisk(root, links=self.links)


SCRIPTS = {
    "updates": Script(UPDATES),
    "forks": Script(FORKS),
    "copies": Script(FORKS[:5], links=False),
    "lineages": Script(LINEAGES),
}


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> Script:
    return SCRIPTS[request.param]


@pytest.fixture(autouse=True)
def _merge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.store.archive, "MOST_SEGMENTS", 2)


def check_found(disk: MemoryDisk, allowed: list[Memories], ever: set[str]) -> None:
    """Opens the store that a crash has left; works on with it; and does so again after another crash.

    ``ever`` are all contents that were ever stored: those that are in no memory now are nowhere on the disk.
    """
    store = open_store(disk)
    found = observe(store)
    assert found in allowed
    check_clean(disk, store)
    there = b"".join(bytes(leaf.now) for _, leaf in disk.leaves())
    for content in ever.difference(*(memory.contents for memory in found.values())):
        assert content.encode() not in there
    for tenant in TENANTS:
        steps = [] if tenant in found else [Step("create", tenant, life=9)]
        steps += [Step("commit", tenant, len(found.get(tenant, Memory()).contents) + 1, life=9)]
        for step in steps:
            step.on_store(store, found)
            found = step.on_model(found)
    store.close()
    store = open_store(disk.after_crash("synced"))
    assert observe(store) == found
    store.close()


def files_of(disk: MemoryDisk) -> list[Path]:
    """All but journals, which may be folded into their manifests at any time."""
    return [path for path, _ in disk.leaves() if path.suffix != ".journal"]


def whole_run(root: Path, script: Script, moment: str = "before") -> tuple[int, Memories]:
    """How many calls the script makes that could fail at ``moment``, and what it leaves."""
    disk = script.disk(root)
    calls: list[str] = []
    setattr(disk, moment, lambda call, path: calls.append(call))
    store, memories = open_store(disk), Memories()
    for step in script.steps:
        step.on_store(store, memories)
        memories = step.on_model(memories)
        assert observe(store) == memories
        check_clean(disk, store)
    store.close()
    return len(calls), memories


ENDS = {
    "updates": {"ada": (1, 0)},
    "forks": {"bob": (2, 0), "carol": (2, 0)},
    "copies": {"ada": (2, 0), "bob": (2, 0)},
    "lineages": {"ada": (2, 0)},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_without_a_failure(tmp_path: Path, name: str) -> None:
    calls, memories = whole_run(tmp_path, SCRIPTS[name])
    assert calls > 80
    assert {name: (len(m.contents), m.lineage) for name, m in memories.items()} == ENDS[name]


def test_a_crash_at_every_call_loses_nothing_acknowledged(tmp_path: Path, script: Script) -> None:
    calls, _ = whole_run(tmp_path, script)
    kinds = [*KEPT, *map(random.Random, range(3))]
    for number in range(calls):
        disk = script.disk(tmp_path)
        left = number

        def crash(call: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash

        disk.before = crash
        allowed: list[Memories] = [{}]
        ever: set[str] = set()
        store = None
        try:
            store = open_store(disk)
            for step in script.steps:
                allowed = [allowed[-1], step.on_model(allowed[-1])]
                ever.update(*(memory.contents for memory in allowed[1].values()))
                step.on_store(store, allowed[0])
                allowed = allowed[1:]
        except Crash:
            if store is not None:
                store.close()
        else:
            pytest.fail("nothing crashed")
        for kept in kinds:
            check_found(disk.after_crash(kept), allowed, ever)


# before a call fails, by turns with an error of the disk and for want of room; or after it was done
FAILURES = [
    ("before", 0, 2, errno.EIO, "StoreFailed"),
    ("before", 1, 2, errno.ENOSPC, "StoreFull"),
    ("after", 0, 1, errno.EIO, "StoreFailed"),
]


@pytest.mark.parametrize(("moment", "first", "stride", "number", "expected"), FAILURES)
def test_a_failure_at_every_call_is_reported_and_got_over(
    tmp_path: Path, script: Script, moment: str, first: int, stride: int, number: int, expected: str
) -> None:
    calls, final = whole_run(tmp_path, script, moment)
    kinds = set()
    for failing in range(first, calls, stride):
        disk = script.disk(tmp_path)
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
        for step in script.steps:
            after = step.on_model(memories)
            try:
                step.on_store(store, memories)
            except (StoreFailed, StoreFull) as error:
                assert left < 0
                kinds.add(type(error).__name__)
                seen = observe(store)
                check_seen(seen, memories, None if isinstance(error, StoreFull) else after)
                # what a reader has been shown after a failure must not go away again
                shown = open_store_elsewhere(disk.after_crash("synced"))
                assert seen == shown, (failing, step)
                if seen != after or step.does in {"compact", "erase"}:
                    again(step, store, memories)
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


def again(step: Step, store: Store, memories: Memories) -> None:
    """The retry of a step that failed. An erasure that was complete but for its report finds nothing."""
    try:
        step.on_store(store, memories)
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


STEPS = [(name, n) for name, script in SCRIPTS.items() for n in range(len(script.steps))]


@pytest.mark.parametrize(
    ("name", "position"), STEPS, ids=[f"{name}: {SCRIPTS[name].steps[n]}" for name, n in STEPS]
)
def test_a_full_disk_changes_nothing_and_leaves_everything_readable(
    tmp_path: Path, name: str, position: int
) -> None:
    """Every call that needs room fails, from some call on, for the length of an operation."""
    script = SCRIPTS[name]
    step, needed = script.steps[position], 0
    while True:
        disk = script.disk(tmp_path)
        store, memories = open_store(disk), Memories()
        for earlier in script.steps[:position]:
            earlier.on_store(store, memories)
            memories = earlier.on_model(memories)
        before = files_of(disk)
        left = needed

        def full(call: str, path: Path) -> None:
            nonlocal left
            if call in {"create", "write", "sync", "make_directory", "rename", "link"}:
                left -= 1
                if left < 0:
                    raise OSError(errno.ENOSPC, "injected", str(path))

        disk.before = full
        try:
            step.on_store(store, memories)
        except StoreFull:
            assert observe(store) == memories
            assert files_of(disk) == before
        else:
            assert left >= 0
            store.close()
            break
        disk.before = lambda call, path: None
        step.on_store(store, memories)
        assert observe(store) == step.on_model(memories)
        store.close()
        needed += 1
    assert needed > 0


def test_an_unknown_outcome_stays_hidden_until_it_is_durable(tmp_path: Path) -> None:
    """The directory's sync fails after the manifest's rename, and goes on failing."""
    disk = MemoryDisk(tmp_path)
    store = open_store(disk)
    UPDATES[0].on_store(store, {})
    directory = next(path.parent for path, _ in disk.leaves() if path.name == "manifest")
    renamed = False

    def fail(call: str, path: Path) -> None:
        nonlocal renamed
        renamed |= call == "rename"
        if renamed and call == "sync_directory" and path == directory:
            raise OSError(errno.EIO, "injected", str(path))

    disk.before = fail
    with pytest.raises(StoreFailed):
        UPDATES[1].on_store(store, {})
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
