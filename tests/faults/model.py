"""The model of what a store has acknowledged: operations on store and model alike, and what a reader must see."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Store
from app.store.disk import DiskStore
from app.store.journal import Head
from app.store.records import unseal
from tests.store.memorydisk import Folder, MemoryDisk

TENANTS = ("ada", "bob", "carol")
# a lock that was let go is free at once
PATIENCE = 0.0


class Memory(NamedTuple):
    """The blocks' contents; a tenant's blocks differ from those of other lives and lineages."""

    contents: tuple[str, ...] = ()
    lineage: int = 0


Memories = dict[str, Memory]


class Step:
    """One operation on one tenant, on the store and on the model alike.

    ``version`` is the block's, the snapshot's or the one that a memory comes to; ``target`` is a fork's.
    """

    def __init__(self, does: str, tenant: str, version: int = 0, life: int = 1, target: str = "") -> None:
        self.does, self.tenant, self.version, self.life, self.target = does, tenant, version, life, target

    def __repr__(self) -> str:
        return f"{self.does} {self.tenant} {self.version} {self.target}".strip()

    def content(self, version: int) -> str:
        return f"<{self.tenant}-{self.life}-{version}>" * 30

    def contents(self) -> tuple[str, ...]:
        return tuple(map(self.content, range(1, self.version + 1)))

    def manifest(self) -> Manifest:
        return Manifest(self.tenant, self.life, "fingerprint", 0.0)

    def on_store(self, store: Store, memories: Memories) -> None:
        tenant, version = self.tenant, self.version
        now = len(memories[tenant].contents) if tenant in memories else 0
        beginning = msgspec.structs.replace(self.manifest(), version=version)
        pool = "|".join(self.contents()).encode()
        records = [
            BlockRecord(v, BlobRef("", 0, ""), 0.0, 16, "text", mark(v)) for v in range(1, version + 1)
        ]
        if self.does == "create":
            store.create(self.manifest())
        elif self.does == "import":
            store.create(beginning, pool, records)
        elif self.does == "replace":
            old = store.load(tenant)
            assert old is not None
            store.replace(tenant, old, beginning, pool, records)
        elif self.does == "commit":
            data = self.content(version).encode()
            more = {"text": "text", "idempotency": mark(version)}
            store.commit(tenant, version - 1, data, time=0.0, tokens=16, **more)  # type: ignore[arg-type]
        elif self.does == "compact":
            store.compact(tenant, version, "|".join(memories[tenant].contents[:version]).encode())
        elif self.does == "fork":
            store.fork(tenant, self.target, version=version, created=1.0)
        elif self.does == "rollback":
            store.rollback(tenant, version, expected_version=now)
        else:
            assert store.erase(tenant) is not None

    def on_model(self, memories: Memories) -> Memories:
        after, old = dict(memories), memories.get(self.tenant, Memory())
        if self.does == "create":
            after[self.tenant] = Memory()
        elif self.does == "import":
            after[self.tenant] = Memory(self.contents())
        elif self.does == "replace":
            after[self.tenant] = Memory(self.contents(), old.lineage + 1)
        elif self.does == "commit":
            after[self.tenant] = Memory((*old.contents, self.content(self.version)), old.lineage)
        elif self.does == "fork":
            after[self.target] = Memory(old.contents[: self.version])
        elif self.does == "rollback":
            after[self.tenant] = Memory(old.contents[: self.version], old.lineage + 1)
        elif self.does == "erase":
            del after[self.tenant]
        return after


def mark(version: int) -> Idempotency:
    return Idempotency(f"key {version}", 0, 1, "digest")


def open_store(disk: MemoryDisk) -> DiskStore:
    return DiskStore(disk.root, files=disk, patience=PATIENCE)


def observe(store: Store) -> Memories:
    """All that a reader can see, with the store's own consistency checked on the way."""
    seen: Memories = {}
    for tenant in TENANTS:
        manifest = store.load(tenant)
        if manifest is None:
            continue
        contents: list[str] = []
        if manifest.snapshot is not None:
            contents = bytes(store.read(tenant, manifest.snapshot.blob)).decode().split("|")
        contents += [bytes(store.read(tenant, block.blob)).decode() for block in manifest.blocks]
        assert len(contents) == manifest.version
        assert [r.version for r in store.history(tenant)] == list(range(1, manifest.version + 1))
        for version in range(1, manifest.version + 2):
            assert len(store.find(tenant, f"key {version}")) == (version <= manifest.version)
        assert all(record.text == "text" for record in store.history(tenant))
        seen[tenant] = Memory(tuple(contents), manifest.lineage)
    assert list(store.tenants()) == sorted(seen)
    return seen


def check_clean(disk: MemoryDisk, store: DiskStore) -> None:
    """Nothing lies in the store that nobody names, but the empty files that it has made ahead."""
    named = set()
    for tenant in TENANTS:
        manifest = store.load(tenant)
        if manifest is not None:
            refs = [b.blob for b in manifest.blocks] + list(manifest.archive)
            refs += [manifest.snapshot.blob] if manifest.snapshot is not None else []
            named |= {ref.name for ref in refs} | {f"name of {tenant}", f"manifest of {tenant}"}
            named |= store.waiting(tenant)
    named |= {
        unseal(bytes(leaf.now), Head).journal or "" for path, leaf in disk.leaves() if path.name == "manifest"
    }
    found = [path for path, _ in disk.leaves() if path.parent != disk.root]
    assert len(found) == len(named - {""}), found
    for name in ("staging", "trash"):
        folder = disk.folder.now[name]
        assert isinstance(folder, Folder)
        assert not folder.now
