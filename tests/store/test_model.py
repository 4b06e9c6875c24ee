"""Random operations, failures and crashes, compared with a dictionary."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from app.errors import StoreFailed, StoreFull, TenantExists, TenantNotFound, VersionConflict
from app.store.base import Idempotency, Manifest
from app.store.disk import DiskStore
from tests.store.memorydisk import Crash, Kept, MemoryDisk

LIMIT = 6
tenants = st.sampled_from(["ada", "bob", "carol"])
keys = st.sampled_from(["one", "two", "three", None])
kept: st.SearchStrategy[Kept] = st.sampled_from(["synced", "names", "all"])


class Life:
    """What the model knows of one tenant: contents and keys by version, and the last compaction."""

    def __init__(self) -> None:
        self.blocks: list[tuple[bytes, str | None]] = []
        self.compacted = 0

    def remembered(self) -> list[int]:
        newest = len(self.blocks)
        count = max(LIMIT, newest - self.compacted)
        return list(range(max(1, newest - count + 1), newest + 1))


class StoreMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.disk = MemoryDisk(Path(self.directory.name))
        self.lives: dict[str, Life] = {}
        self.serial = 0
        self.open()

    def open(self) -> None:
        self.store = DiskStore(
            self.disk.root, files=self.disk, history_limit=LIMIT, patience=0.0, text_key=bytes(32)
        )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.directory.cleanup()

    @rule(tenant=tenants)
    def create(self, tenant: str) -> None:
        try:
            self.store.create(Manifest(tenant, 1, "f", 0.0))
            assert tenant not in self.lives
            self.lives[tenant] = Life()
        except TenantExists:
            assert tenant in self.lives

    @rule(tenant=tenants, ahead=st.sampled_from([0, 0, 0, 0, -1, 1]), key=keys)
    def commit(self, tenant: str, ahead: int, key: str | None) -> None:
        life = self.lives.get(tenant)
        version = len(life.blocks) if life is not None else 0
        self.serial += 1
        data = f"block {self.serial}".encode()
        mark = None if key is None else Idempotency(key, 0, 1, "d")
        try:
            self.store.commit(tenant, version + ahead, data, time=0.0, tokens=1, text="t", idempotency=mark)
            assert life is not None
            assert ahead == 0
            life.blocks.append((data, key))
        except VersionConflict:
            assert ahead != 0
        except TenantNotFound:
            assert life is None

    @rule(tenant=tenants, share=st.floats(0, 1))
    def compact(self, tenant: str, share: float) -> None:
        life = self.lives.get(tenant)
        if life is not None:
            version = round(len(life.blocks) * share)
            pool = b"|".join(data for data, _ in life.blocks[:version])
            self.store.compact(tenant, version, pool)
            life.compacted = max(life.compacted, version)

    @rule(tenant=tenants)
    def erase(self, tenant: str) -> None:
        receipt = self.store.erase(tenant)
        life = self.lives.pop(tenant, None)
        assert (receipt is None) == (life is None)
        if receipt is not None and life is not None:
            assert receipt.version == len(life.blocks)

    @rule(left=kept)
    def crash_between_operations(self, left: Kept) -> None:
        self.store.close()
        self.disk = self.disk.after_crash(left)
        self.open()

    @rule(tenant=tenants, left=kept, call=st.integers(0, 12))
    def crash_in_a_commit(self, tenant: str, left: Kept, call: int) -> None:
        if tenant not in self.lives:
            return
        self.interrupt(call, Crash())
        try:
            self.commit(tenant, 0, "one")
            self.disk.before = lambda call, path: None
        except Crash:
            self.store.close()
            self.disk = self.disk.after_crash(left)
            self.open()
            self.catch_up(tenant)

    @rule(tenant=tenants, call=st.integers(0, 12), number=st.sampled_from([errno.EIO, errno.ENOSPC]))
    def fail_in_a_commit(self, tenant: str, call: int, number: int) -> None:
        if tenant not in self.lives:
            return
        self.interrupt(call, OSError(number, "injected"))
        try:
            self.commit(tenant, 0, "two")
        except (StoreFailed, StoreFull):
            self.catch_up(tenant)
        self.disk.before = lambda call, path: None

    def interrupt(self, call: int, error: BaseException) -> None:
        left = call

        def hook(call: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise error

        self.disk.before = hook

    def catch_up(self, tenant: str) -> None:
        """A commit that was not acknowledged may or may not have been made."""
        manifest = self.store.load(tenant)
        life = self.lives[tenant]
        assert manifest is not None
        if manifest.version == len(life.blocks) + 1:
            mark = manifest.blocks[-1].idempotency
            assert mark is not None
            life.blocks.append((f"block {self.serial}".encode(), mark.key))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        assert list(self.store.tenants()) == sorted(self.lives)
        for tenant in ("ada", "bob", "carol"):
            manifest = self.store.load(tenant)
            life = self.lives.get(tenant)
            assert (manifest is None) == (life is None)
            if manifest is None or life is None:
                continue
            contents: list[bytes] = []
            if manifest.snapshot is not None:
                contents = self.store.read(tenant, manifest.snapshot.blob).split(b"|")
            contents += [self.store.read(tenant, block.blob) for block in manifest.blocks]
            assert contents == [data for data, _ in life.blocks]
            assert [r.version for r in self.store.history(tenant)] == life.remembered()
            for key in ("one", "two", "three"):
                expected = [v for v in life.remembered() if life.blocks[v - 1][1] == key]
                assert [r.version for r in self.store.find(tenant, key)] == expected


StoreMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStore = StoreMachine.TestCase
