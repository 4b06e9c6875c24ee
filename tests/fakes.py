"""A store in memory, for tests of what lies above the store; the real ones have contract tests."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NoReturn

from app.errors import TenantExists, TenantNotFound, VersionConflict
from app.store import lineages
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Receipt, Snapshot
from app.store.names import chosen
from app.store.reading import BlobReader
from app.store.records import blob_checksum


class Piecewise:
    """Bytes that are read as a file."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read_at(self, buffer: memoryview, offset: int) -> int:
        piece = self._data[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None: ...


def _never(error: OSError) -> NoReturn:
    raise error


class MemoryStore:
    """Keeps every record, and texts as they are; nothing survives it."""

    def __init__(self) -> None:
        self.manifests: dict[str, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.archived: dict[str, list[BlockRecord]] = {}
        self.lock = threading.RLock()
        self._names = count()

    # ------------------------------------------------------------ reading

    def tenants(self, only: Sequence[str] | None = None) -> Iterator[str]:
        with self.lock:
            names = sorted(self.manifests)
            return iter(names if only is None else chosen(names, only))

    def claim(self, tenant: str) -> Manifest | None:
        return self.load(tenant)

    def claimed(self, tenant: str) -> bytes | None:
        return b"the only one"

    def holds(self, tenant: str) -> bool:
        return True

    def release(self, tenant: str) -> None: ...

    def load(self, tenant: str) -> Manifest | None:
        return self.manifests.get(tenant)

    def _require(self, tenant: str) -> Manifest:
        manifest = self.load(tenant)
        if manifest is None:
            raise TenantNotFound("absent")
        return manifest

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        with self.lock:
            self._require(tenant)
            if blob.name not in self.blobs:
                raise VersionConflict("the memory has changed meanwhile")
            return self.blobs[blob.name]

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None: ...

    def reader(self, tenant: str, blob: BlobRef) -> BlobReader:
        return BlobReader(blob, Piecewise(MemoryStore.read(self, tenant, blob)), _never)

    def history(self, tenant: str) -> list[BlockRecord]:
        with self.lock:
            manifest = self._require(tenant)
            return [*self.archived.get(tenant, []), *manifest.blocks]

    def times(self, tenant: str) -> list[float]:
        return [record.time for record in self.history(tenant)]

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        return [r for r in self.history(tenant) if r.idempotency and r.idempotency.key == key]

    def usage(self, tenant: str) -> int:
        return sum(ref.size for ref in lineages.blobs_of(self._require(tenant)))

    # ------------------------------------------------------------ making

    def _new_name(self, version: int, kind: str) -> str:
        return f"{version}-{next(self._names)}.{kind}"

    def _put(self, blob: bytes, version: int, kind: str) -> BlobRef:
        name = self._new_name(version, kind)
        self.blobs[name] = blob
        return BlobRef(name, len(blob), blob_checksum(blob))

    def create(
        self, manifest: Manifest, snapshot: bytes | None = None, records: Sequence[BlockRecord] = ()
    ) -> Manifest:
        lineages.require_beginning(manifest, snapshot, records)
        with self.lock:
            if manifest.tenant in self.manifests:
                raise TenantExists("exists")
            first = None if snapshot is None else self._put(snapshot, manifest.version, "snapshot")
            self.archived[manifest.tenant] = list(records)
            self.manifests[manifest.tenant] = lineages.begun(manifest, first)
            return self.manifests[manifest.tenant]

    def fork(self, tenant: str, target: str, *, version: int | None = None, created: float) -> Manifest:
        with self.lock:
            source = self._require(tenant)
            if target in self.manifests:
                raise TenantExists("exists")
            new, copies = lineages.forked(source, target, version, created, self._new_name, lambda r: r)
            for theirs, ours in copies:
                self.blobs[ours.name] = self.blobs[theirs.name]
            self.archived[target] = list(self.archived.get(tenant, []))
            self.manifests[target] = new
            return new

    # ------------------------------------------------------------ changing

    def _swap(self, old: Manifest, new: Manifest) -> Manifest:
        for name in lineages.dropped(old, new):
            self.blobs.pop(name, None)
        self.manifests[new.tenant] = new
        return new

    def commit(
        self,
        tenant: str,
        expected_version: int,
        blob: bytes,
        *,
        time: float,
        tokens: int,
        text: str | None = None,
        idempotency: Idempotency | None = None,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        with self.lock:
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage, created)
            version = expected_version + 1
            ref = self._put(blob, version, "block")
            record = BlockRecord(version, ref, time, tokens, text, idempotency)
            return self._swap(old, lineages.committed(old, record))

    def compact(
        self,
        tenant: str,
        version: int,
        snapshot: bytes,
        *,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        with self.lock:
            old = self._require(tenant)
            lineages.require_lineage(old, lineage, created)
            if version > old.version:
                raise VersionConflict("not there yet")
            if version <= lineages.oldest(old):
                return old
            gone = [b for b in old.blocks if b.version <= version]
            self.archived.setdefault(tenant, []).extend(gone)
            first = Snapshot(version, self._put(snapshot, version, "snapshot"))
            return self._swap(old, lineages.compacted(old, first, ()))

    def rollback(
        self,
        tenant: str,
        version: int,
        *,
        expected_version: int,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        with self.lock:
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage, created)
            return self._swap(old, lineages.rolled_back(old, version))

    def replace(
        self,
        tenant: str,
        old: Manifest,
        new: Manifest,
        snapshot: bytes | None,
        records: Sequence[BlockRecord],
    ) -> Manifest:
        lineages.require_beginning(new, snapshot, records)
        if new.tenant != tenant:
            raise ValueError("another tenant")
        with self.lock:
            current = self._require(tenant)
            lineages.require_same(current, old)
            first = None if snapshot is None else self._put(snapshot, new.version, "snapshot")
            self.archived[tenant] = list(records)
            return self._swap(current, lineages.replaced(current, new, first))

    def erase(self, tenant: str) -> Receipt | None:
        with self.lock:
            manifest = self.manifests.pop(tenant, None)
            self.archived.pop(tenant, None)
            if manifest is None:
                return None
            refs = lineages.blobs_of(manifest)
            for ref in refs:
                self.blobs.pop(ref.name, None)
            return Receipt(tenant, manifest.version, len(refs), sum(ref.size for ref in refs))

    def close(self) -> None: ...
