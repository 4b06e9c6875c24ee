"""Any operation fails at any call and goes on failing, and power cuts keep any part of what was not synced."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import app.store.archive
from app.errors import (
    StoreFailed,
    StoreFull,
    TenantExists,
    TenantNotFound,
    VersionConflict,
    VersionNotKept,
)
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest
from app.store.disk import DiskStore
from tests.store.memorydisk import MemoryDisk

NAMES = st.sampled_from(["ada", "../bob", "🙂"])
KEYS = st.sampled_from([None, "k1", "k2"])
TEXTS = st.sampled_from([None, "a text", "plain:", "aes256gcm:"])

# content, text and key of a block
Block = tuple[bytes, str | None, str | None]


@dataclass(frozen=True)
class Memory:
    """What a tenant's memory holds, as the model knows it."""

    blocks: tuple[Block, ...] = ()
    lineage: int = 0

    @property
    def version(self) -> int:
        return len(self.blocks)

    def pool(self, version: int) -> bytes:
        return b"|".join(data for data, _, _ in self.blocks[:version])

    def records(self) -> list[BlockRecord]:
        return [
            BlockRecord(version, BlobRef("", 0, ""), 0.0, 16, text, mark(key))
            for version, (_, text, key) in enumerate(self.blocks, 1)
        ]


def mark(key: str | None) -> Idempotency | None:
    return None if key is None else Idempotency(key, 0, 1, "digest")


def beginning(tenant: str, memory: Memory) -> Manifest:
    return Manifest(tenant, 1, "fingerprint", 0.0, version=memory.version)


@pytest.fixture(autouse=True)
def _merge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.store.archive, "MOST_SEGMENTS", 2)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.disk = MemoryDisk(self.root)
        self.model: dict[str, Memory] = {}
        self.unfinished: set[str] = set()
        self.made = 0

    @initialize(key=st.sampled_from([None, bytes(32)]))
    def open(self, key: bytes | None) -> None:
        self.options = {"text_key": key}
        self.store = DiskStore(self.root, files=self.disk, patience=0.0, **self.options)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.disk.before = lambda call, path: None
            self.store.close()
        shutil.rmtree(self.root)

    # ------------------------------------------------------------ what may happen

    @rule(tenant=NAMES)
    def create(self, tenant: str) -> None:
        manifest = Manifest(tenant, 1, "fingerprint", 0.0)
        if tenant in self.model:
            with pytest.raises(TenantExists):
                self.store.create(manifest)
        else:
            self.store.create(manifest)
            self.model[tenant] = Memory()

    def block(self, tenant: str, key: str | None, text: str | None) -> Block:
        self.made += 1
        return (f"{tenant} {self.made}".encode() * 40, text, key)

    def memory(self, tenant: str, blocks: int, key: str | None, text: str | None) -> Memory:
        return Memory(tuple(self.block(tenant, key, text) for _ in range(blocks)))

    def write(self, tenant: str, block: Block, expected: int) -> None:
        data, text, key = block
        self.store.commit(tenant, expected, data, time=0.0, tokens=16, text=text, idempotency=mark(key))

    def import_(self, tenant: str, memory: Memory) -> None:
        pool = memory.pool(memory.version)
        self.store.create(beginning(tenant, memory), pool, memory.records())

    def rebuild(self, tenant: str, memory: Memory) -> None:
        old, pool = self.store.load(tenant), memory.pool(memory.version)
        assert old is not None
        self.store.replace(tenant, old, beginning(tenant, memory), pool, memory.records())

    def keeps(self, tenant: str, version: int) -> bool:
        manifest = self.store.load(tenant)
        assert manifest is not None
        oldest = 0 if manifest.snapshot is None else manifest.snapshot.version
        return oldest <= version <= manifest.version

    @rule(tenant=NAMES, key=KEYS, text=TEXTS, off=st.sampled_from([0, 0, 0, 0, -1, 1]))
    def commit(self, tenant: str, key: str | None, text: str | None, off: int) -> None:
        block = self.block(tenant, key, text)
        if tenant not in self.model:
            with pytest.raises(TenantNotFound):
                self.write(tenant, block, 0)
            return
        memory = self.model[tenant]
        if off:
            with pytest.raises(VersionConflict):
                self.write(tenant, block, memory.version + off)
        else:
            self.write(tenant, block, memory.version)
            self.model[tenant] = replace(memory, blocks=(*memory.blocks, block))

    @rule(tenant=NAMES, back=st.integers(0, 3))
    def compact(self, tenant: str, back: int) -> None:
        memory = self.model.get(tenant, Memory())
        version = max(0, memory.version - back)
        if tenant not in self.model:
            with pytest.raises(TenantNotFound):
                self.store.compact(tenant, version, memory.pool(version))
        else:
            self.store.compact(tenant, version, memory.pool(version), lineage=memory.lineage)

    @rule(tenant=NAMES, blocks=st.integers(1, 3), key=KEYS, text=TEXTS)
    def import_a_memory(self, tenant: str, blocks: int, key: str | None, text: str | None) -> None:
        memory = self.memory(tenant, blocks, key, text)
        if tenant in self.model:
            with pytest.raises(TenantExists):
                self.import_(tenant, memory)
        else:
            self.import_(tenant, memory)
            self.model[tenant] = memory

    @rule(tenant=NAMES, to=NAMES, back=st.integers(-1, 3))
    def fork(self, tenant: str, to: str, back: int) -> None:
        memory = self.model.get(tenant, Memory())
        version = memory.version - back
        expected: type[Exception] | None = None
        if tenant not in self.model:
            expected = TenantNotFound
        elif to in self.model:
            expected = TenantExists
        elif not self.keeps(tenant, version):
            expected = VersionNotKept
        if expected is not None:
            with pytest.raises(expected):
                self.store.fork(tenant, to, version=version, created=0.0)
        else:
            self.store.fork(tenant, to, version=version, created=0.0)
            self.model[to] = Memory(memory.blocks[:version])

    @rule(tenant=NAMES, back=st.integers(-1, 3), off=st.sampled_from([0, 0, 0, 1]))
    def rollback(self, tenant: str, back: int, off: int) -> None:
        memory = self.model.get(tenant, Memory())
        version = memory.version - back
        expected: type[Exception] | None = None
        if tenant not in self.model:
            expected = TenantNotFound
        elif off:
            expected = VersionConflict
        elif not self.keeps(tenant, version):
            expected = VersionNotKept
        if expected is not None:
            with pytest.raises(expected):
                self.store.rollback(tenant, version, expected_version=memory.version + off)
        else:
            self.store.rollback(tenant, version, expected_version=memory.version)
            self.model[tenant] = Memory(memory.blocks[:version], memory.lineage + 1)

    @rule(tenant=NAMES, blocks=st.integers(1, 3), key=KEYS, text=TEXTS)
    def rebuild_a_memory(self, tenant: str, blocks: int, key: str | None, text: str | None) -> None:
        if tenant in self.model:
            memory = replace(self.memory(tenant, blocks, key, text), lineage=self.model[tenant].lineage + 1)
            self.rebuild(tenant, memory)
            self.model[tenant] = memory

    @rule(tenant=NAMES)
    def erase(self, tenant: str) -> None:
        receipt = self.store.erase(tenant)
        there = self.model.pop(tenant, None)
        # an erasure that failed when all was out of reach goes on where it was
        assert (receipt is None) == (there is None) or (there is None and tenant in self.unfinished)
        self.unfinished.discard(tenant)
        if receipt is not None and there is not None:
            assert receipt.version == there.version

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = DiskStore(self.root, files=self.disk, patience=0.0, **self.options)

    @rule(seed=st.integers(0, 2**32))
    def power_cut(self, seed: int) -> None:
        self.store.close()
        self.disk = self.disk.after_crash(random.Random(seed))
        self.store = DiskStore(self.root, files=self.disk, patience=0.0, **self.options)

    @rule(
        tenant=NAMES,
        to=NAMES,
        does=st.sampled_from(
            ["create", "commit", "compact", "import", "fork", "rollback", "rebuild", "erase"]
        ),
        call=st.integers(0, 14),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        seed=st.none() | st.integers(0, 2**32),
    )
    def failing_call(self, tenant: str, to: str, does: str, call: int, number: int, seed: int | None) -> None:
        """The operation's ``call``-th call and all later ones fail; then the power may fail as well."""
        left, before, after = call, dict(self.model), dict(self.model)
        old, new = self.model.get(tenant), self.memory(tenant, 2, None, None)
        changed = tenant
        operation: Callable[[], object] = lambda: None  # noqa: E731
        if does == "erase":
            after.pop(tenant, None)
            operation = partial(self.store.erase, tenant)
        elif old is None:
            if does == "create":
                after[tenant] = Memory()
                operation = partial(self.store.create, Manifest(tenant, 1, "fingerprint", 0.0))
            elif does == "import":
                after[tenant] = new
                operation = partial(self.import_, tenant, new)
        elif does == "commit":
            after[tenant] = replace(old, blocks=(*old.blocks, new.blocks[0]))
            operation = partial(self.write, tenant, new.blocks[0], old.version)
        elif does == "compact":
            operation = partial(self.store.compact, tenant, old.version, old.pool(old.version))
        elif does == "fork" and to not in self.model:
            changed, after[to] = to, Memory(old.blocks)
            operation = partial(self.store.fork, tenant, to, created=0.0)
        elif does == "rollback" and self.keeps(tenant, old.version - 1):
            after[tenant] = Memory(old.blocks[:-1], old.lineage + 1)
            operation = partial(self.store.rollback, tenant, old.version - 1, expected_version=old.version)
        elif does == "rebuild":
            after[tenant] = replace(new, lineage=old.lineage + 1)
            operation = partial(self.rebuild, tenant, new)

        def fail(_: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(number, "injected", str(path))

        self.disk.before = fail
        failed: Exception | None = None
        try:
            operation()
        except (StoreFailed, StoreFull) as error:
            failed = error
        self.disk.before = lambda _, path: None
        if seed is not None:
            self.power_cut(seed)
        self.model = after
        if failed is not None:
            if does == "erase":
                self.unfinished.add(tenant)
            manifest = self.store.load(changed)
            found = None if manifest is None else (manifest.lineage, manifest.version)
            told = [
                (m[changed].lineage, m[changed].version) if changed in m else None for m in (before, after)
            ]
            assert found in told
            if found == told[0]:
                self.model = before
            if isinstance(failed, StoreFull) and seed is None:
                assert self.model == before

    # ------------------------------------------------------------ what must hold

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "store"):
            return
        assert list(self.store.tenants()) == sorted(self.model)
        for tenant, memory in self.model.items():
            blocks, manifest = memory.blocks, self.store.load(tenant)
            assert manifest is not None
            assert (manifest.version, manifest.lineage) == (memory.version, memory.lineage)
            contents: list[bytes] = []
            if manifest.snapshot is not None:
                contents = bytes(self.store.read(tenant, manifest.snapshot.blob)).split(b"|")
                assert len(contents) == manifest.snapshot.version
            contents += [self.store.read(tenant, record.blob) for record in manifest.blocks]
            assert contents == [data for data, _, _ in blocks]
            assert [record.text for record in self.store.history(tenant)] == [text for _, text, _ in blocks]
            for key in ("k1", "k2", "never"):
                versions = [record.version for record in self.store.find(tenant, key)]
                assert versions == [n for n, (_, _, k) in enumerate(blocks, 1) if k == key]
        parts = [path.relative_to(self.root).parts for path, _ in self.disk.leaves()]
        assert len({part[2] for part in parts if part[0] == "tenants"}) == len(self.model)


StoreMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStore = StoreMachine.TestCase
