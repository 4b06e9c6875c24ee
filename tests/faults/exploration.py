"""Every crash of random scripts on a disk that forgets: ``python -m tests.faults.exploration --states 1000000``.

At every call that changes the disk the power may fail. What is found then depends on what the disk had written of the
changes not synced yet: none, all, or any part of each. Each such state is opened as a store and compared with the
model of what was acknowledged; some are worked on, and some crash again while they are opened.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import app.store.ahead
import app.store.archive
import app.store.journal
from app.errors import ServiceError, StoreFailed, StoreFull
from app.store.base import Store
from app.store.disk import DiskStore
from tests.faults.model import TENANTS, Memories, Memory, Step, check_clean, observe, open_store
from tests.faults.scripts import script
from tests.store.memorydisk import Kept, MemoryDisk

_STEPS = 10
_DRAWS = 24
_WORKED_ON = 16
_CRASHED_AGAIN = 64
_KILLED = 8


class Violation(Exception):
    """A state in which something acknowledged is missing, something half-done shows, or nothing can be opened."""


@dataclass
class Exploration:
    """Counts what was explored. States are told apart by what lies on the disk and how far the script had come."""

    root: Path
    most: int
    crashes: int = 0
    again: int = 0
    failures: int = 0
    scripts: int = 0
    seen: set[int] = field(default_factory=set)

    @property
    def states(self) -> int:
        return len(self.seen)

    @property
    def done(self) -> bool:
        return self.states >= self.most

    # ------------------------------------------------------------ one script

    def run(self, seed: int, *, crashing: bool = True) -> None:
        """Runs one script, ``crashing`` at every call; every other script has calls that fail too. Raises Violation."""
        draw = random.Random(seed)
        disk = MemoryDisk(self.root, links=bool(draw.randrange(4)))
        state = _Running([{}], set())

        def crash(call: str, path: Path) -> None:
            self._crash_now(disk, state, draw, (seed, call))

        if crashing:
            disk.before = crash
        with _merging_early():
            store: Store = open_store(disk)
            memories: Memories = {}
            if seed % 2:
                self._fail(disk, draw, state)
            for number, step in enumerate(script(seed, _STEPS)):
                after = step.on_model(memories)
                state.allowed, state.step = [memories, after], number
                state.ever |= {c for memory in after.values() for c in memory.contents}
                memories = self._step(disk, store, step, memories, after, state, draw, seed)
                state.allowed = [memories]
                self._look(disk, store, state, f"script {seed}, after {step!r}")
                if self.done:
                    break
            store.close()
        self.scripts += 1

    def _fail(self, disk: MemoryDisk, draw: random.Random, state: _Running) -> None:
        """Has some later calls fail: an error before, or an error after the thing was done."""
        explore = disk.before
        countdown = draw.randrange(5, 60)

        def fail(call: str, path: Path) -> None:
            nonlocal countdown
            countdown -= 1
            if countdown == 0:
                self.failures += 1
                state.failures += 1
                # now and then so soon that what mends the first fails too
                countdown = draw.randrange(20, 80) if draw.randrange(3) else draw.randrange(1, 20)
                number = draw.choice([errno.EIO, errno.ENOSPC])
                raise OSError(number, os.strerror(number), str(path))

        def before(call: str, path: Path) -> None:
            explore(call, path)
            if draw.randrange(2):
                fail(call, path)

        disk.before, disk.after = before, fail

    def _crash_now(self, disk: MemoryDisk, state: _Running, draw: random.Random, where: object) -> None:
        self.crashes += 1
        kinds: list[Kept] = ["synced", "names", "all"]
        kinds += [random.Random(draw.getrandbits(32)) for _ in range(_DRAWS)]
        for kept in kinds:
            if not self.done:
                self._found(disk.after_crash(kept), state, draw, (where, kept))
        if self.crashes % _KILLED == 0 and not state.failures:
            self._killed(disk, state, where)

    def _step(
        self,
        disk: MemoryDisk,
        store: Store,
        step: Step,
        memories: Memories,
        after: Memories,
        state: _Running,
        draw: random.Random,
        seed: int,
    ) -> Memories:
        """Does ``step``, again while it fails; returns the model's memories after it."""
        for _ in range(20):
            try:
                step.on_store(store, memories)
            except (StoreFailed, StoreFull) as error:
                if not state.failures:
                    raise Violation(f"script {seed}, {step!r} failed, and no call had: {error}") from error
                seen = next(
                    (seen for _ in range(20) for seen in [_observed(store)] if seen is not None), None
                )
                if seen is None:
                    break
                # "no room" says that nothing was changed; but of an erasure, that it is to be asked for again
                unchanged = isinstance(error, StoreFull) and step.does != "erase"
                allowed = [memories] if unchanged else [memories, after]
                if seen not in allowed:
                    raise Violation(
                        f"script {seed}, {step!r} failed: a reader sees what never was"
                    ) from error
                # what a reader has seen is what is found from now on
                state.allowed = [seen]
                self._crash_now(disk, state, draw, (seed, "behind a failure", step))
                if seen == after:
                    return after
                state.allowed = [memories, after]
                continue
            except AssertionError as error:
                # an erasure that failed in its last call has nothing left to erase
                if step.does == "erase" and state.failures and _observed(store) == after:
                    return after
                raise Violation(f"script {seed}, {step!r}: {error}") from error
            except (ServiceError, OSError) as error:
                raise Violation(f"script {seed}, {step!r}: {type(error).__name__}: {error}") from error
            return after
        raise Violation(f"script {seed}, {step!r} fails for ever")

    def _look(self, disk: MemoryDisk, store: Store, state: _Running, where: str) -> None:
        """What a reader of the running store sees; what failed calls left behind waits for the next start."""
        try:
            seen = _observed(store)
            assert seen is None or [seen] == state.allowed, "a reader sees something else"
            if not state.failures:
                check_clean(disk, store)
        except (AssertionError, ServiceError) as error:
            raise Violation(f"{where}: {type(error).__name__}: {error}") from error

    # ------------------------------------------------------------ what a crash leaves

    def _found(self, disk: MemoryDisk, state: _Running, draw: random.Random, where: object) -> None:
        mark = _fingerprint(disk, state)
        if mark in self.seen:
            return
        self.seen.add(mark)
        if draw.randrange(_CRASHED_AGAIN) == 0:
            self._crash_again(disk, state, draw, where)
        try:
            self._check(disk, state, work_on=draw.randrange(_WORKED_ON) == 0)
        except (AssertionError, ServiceError, OSError, ValueError) as error:
            raise Violation(f"{where}, operation {state.step}: {type(error).__name__}: {error}") from error

    def _crash_again(self, disk: MemoryDisk, state: _Running, draw: random.Random, where: object) -> None:
        """The power fails at every call of the recovery too."""
        copy = self._elsewhere(disk.after_crash("all"))

        def crash(call: str, path: Path) -> None:
            for kept in ("synced", "all", random.Random(draw.getrandbits(32))):
                found = copy.after_crash(kept)  # type: ignore[arg-type]
                mark = _fingerprint(found, state)
                if mark in self.seen:
                    continue
                self.seen.add(mark)
                self.again += 1
                try:
                    self._check(MemoryDisk(self.root / "again", found.folder), state, work_on=False)
                except (AssertionError, ServiceError, OSError, ValueError) as error:
                    raise Violation(f"{where}, crashed again at {call}: {error!r}") from error

        copy.before = crash
        try:
            store = open_store(copy)
            observe(store)
            store.close()
        except (AssertionError, ServiceError) as error:
            raise Violation(f"{where}: {error!r}") from error

    def _killed(self, disk: MemoryDisk, state: _Running, where: object) -> None:
        """The process dies, the machine lives, and a sync of the next one fails: what that one tells of is durable."""
        draw = random.Random(self.crashes)
        left = MemoryDisk(self.root / "elsewhere", deepcopy(disk.folder), links=disk.links)
        kinds = draw.choice([["sync_over"], ["sync", "sync_over", "sync_directory"]])
        countdown = draw.randrange(1, len(kinds) + 1)

        def fail(call: str, path: Path) -> None:
            nonlocal countdown
            countdown -= call in kinds
            if countdown == 0 and call in kinds:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

        left.before = fail
        try:
            store = next(opened for _ in range(3) for opened in [_opened(left)] if opened is not None)
            try:
                found = next(seen for _ in range(3) for seen in [_observed(store)] if seen is not None)
                assert found in state.allowed, (
                    f"found {_told(found)}, not one of {[*map(_told, state.allowed)]}"
                )
                left.before = lambda call, path: None
                self._work_on(left, store, found)
            finally:
                store.close()
        except (AssertionError, ServiceError, OSError, StopIteration) as error:
            raise Violation(f"{where}, killed, then a sync failed: {error!r}") from error

    def _elsewhere(self, disk: MemoryDisk) -> MemoryDisk:
        """The same disk under another root: the lock is a real file, and the store that crashed still has it."""
        return MemoryDisk(self.root / "elsewhere", disk.folder)

    def _check(self, disk: MemoryDisk, state: _Running, *, work_on: bool) -> None:
        if disk.root == self.root:
            disk = self._elsewhere(disk)
        store = open_store(disk)
        try:
            found = observe(store)
            assert found in state.allowed, f"found {_told(found)}, not one of {[*map(_told, state.allowed)]}"
            check_clean(disk, store)
            there = b"".join(bytes(leaf.now) for _, leaf in disk.leaves())
            for content in state.ever.difference(*(memory.contents for memory in found.values())):
                assert content.encode() not in there, "what was erased is still on the disk"
            if work_on:
                self._work_on(disk, store, found)
        finally:
            store.close()

    def _work_on(self, disk: MemoryDisk, store: Store, found: Memories) -> None:
        for tenant in TENANTS:
            steps = [] if tenant in found else [Step("create", tenant, life=999)]
            steps += [Step("commit", tenant, len(found.get(tenant, Memory()).contents) + 1, life=999)]
            for step in steps:
                step.on_store(store, found)
                found = step.on_model(found)
        store.close()
        store = open_store(disk.after_crash("synced"))
        try:
            assert observe(store) == found
        finally:
            store.close()


@dataclass
class _Running:
    """What may be found if the power fails now; ``ever`` are all contents that were ever stored."""

    allowed: list[Memories]
    ever: set[str]
    step: int = 0
    failures: int = 0


def _told(memories: Memories) -> dict[str, tuple[int, int]]:
    return {tenant: (len(memory.contents), memory.lineage) for tenant, memory in memories.items()}


def _opened(disk: MemoryDisk) -> DiskStore | None:
    """None if the store says that it cannot be opened now."""
    try:
        return open_store(disk)
    except (StoreFailed, StoreFull):
        return None


def _observed(store: Store) -> Memories | None:
    """What a reader sees; None if the store says that it cannot tell now. Raises Violation for other errors."""
    try:
        return observe(store)
    except (StoreFailed, StoreFull):
        return None
    except (ServiceError, AssertionError) as error:
        raise Violation(f"a reader of the running store: {type(error).__name__}: {error}") from error


def _fingerprint(disk: MemoryDisk, state: _Running) -> int:
    digest = hashlib.blake2b(str((state.step, len(state.allowed))).encode(), digest_size=8)
    for path, leaf in disk.leaves():
        digest.update(f"{path.relative_to(disk.root)}:{len(leaf.now)}:".encode())
        digest.update(leaf.now)
    return int.from_bytes(digest.digest())


@contextmanager
def _merging_early() -> Iterator[None]:
    """Archives of two segments are merged, journals hold few records, few files are made ahead: short scripts come to
    their end."""
    with (
        mock.patch.object(app.store.ahead, "MADE_AT_ONCE", 3),
        mock.patch.object(app.store.archive, "MOST_SEGMENTS", 2),
        mock.patch.object(app.store.journal, "SMALLEST", 2048),
    ):
        yield


def explore(
    most: int, first_seed: int = 0, *, calm: int = 0, progress: bool = False, seconds: float = 1e9
) -> Exploration:
    """Explores ``most`` states, or for so many ``seconds``; before that, ``calm`` scripts that do not crash.

    Raises Violation.
    """
    began = told = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("elsewhere", "again"):
            (root / name).mkdir()
        exploration = Exploration(root, most)
        for seed in range(first_seed, first_seed + calm):
            exploration.run(seed, crashing=False)
        seed = first_seed
        while not exploration.done and time.monotonic() - began < seconds:
            exploration.run(seed)
            seed += 1
            if progress and time.monotonic() - told > 10:
                told = time.monotonic()
                rate = exploration.states / (told - began)
                print(
                    f"{exploration.states:,} states, {exploration.crashes:,} crashes of {exploration.scripts:,} "
                    f"scripts (next seed {seed}), {rate:.0f} a second",
                    flush=True,
                )
    return exploration


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.exploration", description=__doc__)
    parser.add_argument("--states", type=int, default=100_000)
    parser.add_argument(
        "--first-seed", type=int, default=0, help="scripts are drawn by seeds from this one on"
    )
    parser.add_argument("--seconds", type=float, default=1e9)
    given = parser.parse_args()
    try:
        found = explore(given.states, given.first_seed, progress=True, seconds=given.seconds)
    except Violation as violation:
        print(f"VIOLATION: {violation}")
        return 1
    print(
        f"{found.states:,} states: {found.crashes:,} crashes in {found.scripts:,} scripts from seed "
        f"{given.first_seed}, {found.again:,} of them crashed again while they were opened, "
        f"{found.failures:,} calls that failed; no acknowledged update was lost or doubled"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
