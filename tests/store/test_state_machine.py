"""Any operation fails at any call and goes on failing, and power cuts keep any part of what was not synced."""

from __future__ import annotations

import errno
import random
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import app.store.archive
from app.errors import StoreFailed, StoreFull, TenantExists, TenantNotFound, VersionConflict
from app.store.base import Idempotency, Manifest
from app.store.disk import DiskStore
from tests.store.memorydisk import MemoryDisk

NAMES = st.sampled_from(["ada", "../bob", "🙂"])
KEYS = st.sampled_from([None, "k1", "k2"])
TEXTS = st.sampled_from([None, "a text", "plain:", "aes256gcm:"])

# content, text and key of every block
Blocks = list[tuple[bytes, str | None, str | None]]


@pytest.fixture(autouse=True)
def _merge_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.store.archive, "MOST_SEGMENTS", 2)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.disk = MemoryDisk(self.root)
        self.model: dict[str, Blocks] = {}
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
            self.model[tenant] = []

    def block(self, tenant: str, key: str | None, text: str | None) -> tuple[bytes, str | None, str | None]:
        self.made += 1
        return (f"{tenant} {self.made}".encode() * 40, text, key)

    def write(self, tenant: str, block: tuple[bytes, str | None, str | None], expected: int) -> None:
        data, text, key = block
        mark = None if key is None else Idempotency(key, 0, 1, "digest")
        self.store.commit(tenant, expected, data, time=0.0, tokens=16, text=text, idempotency=mark)

    @rule(tenant=NAMES, key=KEYS, text=TEXTS, off=st.sampled_from([0, 0, 0, 0, -1, 1]))
    def commit(self, tenant: str, key: str | None, text: str | None, off: int) -> None:
        block = self.block(tenant, key, text)
        if tenant not in self.model:
            with pytest.raises(TenantNotFound):
                self.write(tenant, block, 0)
            return
        expected = len(self.model[tenant]) + off
        if off:
            with pytest.raises(VersionConflict):
                self.write(tenant, block, expected)
        else:
            self.write(tenant, block, expected)
            self.model[tenant].append(block)

    @rule(tenant=NAMES, back=st.integers(0, 3))
    def compact(self, tenant: str, back: int) -> None:
        blocks = self.model.get(tenant, [])
        version = max(0, len(blocks) - back)
        pool = b"|".join(data for data, _, _ in blocks[:version])
        if tenant not in self.model:
            with pytest.raises(TenantNotFound):
                self.store.compact(tenant, version, pool)
        else:
            self.store.compact(tenant, version, pool)

    @rule(tenant=NAMES)
    def erase(self, tenant: str) -> None:
        receipt = self.store.erase(tenant)
        there = self.model.pop(tenant, None)
        assert (receipt is None) == (there is None)
        if receipt is not None and there is not None:
            assert receipt.version == len(there)

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
        does=st.sampled_from(["create", "commit", "compact", "erase"]),
        call=st.integers(0, 14),
        number=st.sampled_from([errno.EIO, errno.ENOSPC]),
        seed=st.none() | st.integers(0, 2**32),
    )
    def failing_call(self, tenant: str, does: str, call: int, number: int, seed: int | None) -> None:
        """The operation's ``call``-th call and all later ones fail; then the power may fail as well."""
        left, before = call, {name: list(blocks) for name, blocks in self.model.items()}

        def fail(_: str, path: Path) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(number, "injected", str(path))

        self.disk.before = fail
        block = self.block(tenant, None, None)
        after = {name: list(blocks) for name, blocks in self.model.items()}
        blocks = after.get(tenant)
        failed: Exception | None = None
        try:
            if does == "create" and blocks is None:
                after[tenant] = []
                self.store.create(Manifest(tenant, 1, "fingerprint", 0.0))
            elif does == "commit" and blocks is not None:
                blocks.append(block)
                self.write(tenant, block, len(blocks) - 1)
            elif does == "compact" and blocks is not None:
                pool = b"|".join(data for data, _, _ in blocks)
                self.store.compact(tenant, len(blocks), pool)
            elif does == "erase":
                after.pop(tenant, None)
                self.store.erase(tenant)
        except (StoreFailed, StoreFull) as error:
            failed = error
        self.disk.before = lambda _, path: None
        if seed is not None:
            self.power_cut(seed)
        self.model = after
        if failed is not None:
            manifest = self.store.load(tenant)
            found = None if manifest is None else manifest.version
            told = [len(m[tenant]) if tenant in m else None for m in (before, after)]
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
        for tenant, blocks in self.model.items():
            manifest = self.store.load(tenant)
            assert manifest is not None
            assert manifest.version == len(blocks)
            contents: list[bytes] = []
            if manifest.snapshot is not None:
                contents = self.store.read(tenant, manifest.snapshot.blob).split(b"|")
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
    max_examples=40,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestStore = StoreMachine.TestCase
