"""A store in memory, for tests of what lies above the store; the real ones have contract tests."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator

from app.errors import TenantExists, TenantNotFound, VersionConflict
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Receipt, Snapshot


class MemoryStore:
    def __init__(self) -> None:
        self.manifests: dict[str, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.archived: dict[str, list[BlockRecord]] = {}
        self.lock = threading.RLock()

    def tenants(self) -> Iterator[str]:
        return iter(sorted(self.manifests))

    def create(self, manifest: Manifest) -> Manifest:
        with self.lock:
            if manifest.tenant in self.manifests:
                raise TenantExists("exists")
            self.manifests[manifest.tenant] = manifest
            return manifest

    def load(self, tenant: str) -> Manifest | None:
        return self.manifests.get(tenant)

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        return self.blobs[blob.name]

    def _put(self, blob: bytes) -> BlobRef:
        name = f"{len(self.blobs)}"
        self.blobs[name] = blob
        return BlobRef(name, len(blob), hashlib.blake2b(blob).hexdigest())

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
    ) -> Manifest:
        with self.lock:
            manifest = self.manifests.get(tenant)
            if manifest is None:
                raise TenantNotFound("absent")
            if manifest.version != expected_version:
                raise VersionConflict("conflict")
            record = BlockRecord(expected_version + 1, self._put(blob), time, tokens, text, idempotency)
            manifest = Manifest(
                tenant,
                manifest.seed,
                manifest.fingerprint,
                manifest.created,
                expected_version + 1,
                manifest.snapshot,
                (*manifest.blocks, record),
            )
            self.manifests[tenant] = manifest
            return manifest

    def compact(self, tenant: str, version: int, snapshot: bytes) -> Manifest:
        with self.lock:
            old = self.manifests[tenant]
            gone = [b for b in old.blocks if b.version <= version]
            self.archived.setdefault(tenant, []).extend(gone)
            for record in gone:
                self.blobs[record.blob.name] = b""
            manifest = Manifest(
                tenant,
                old.seed,
                old.fingerprint,
                old.created,
                old.version,
                Snapshot(version, self._put(snapshot)),
                tuple(b for b in old.blocks if b.version > version),
            )
            self.manifests[tenant] = manifest
            return manifest

    def history(self, tenant: str) -> list[BlockRecord]:
        return [*self.archived.get(tenant, []), *self.manifests[tenant].blocks]

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        return [r for r in self.history(tenant) if r.idempotency and r.idempotency.key == key]

    def erase(self, tenant: str) -> Receipt | None:
        with self.lock:
            manifest = self.manifests.pop(tenant, None)
            self.archived.pop(tenant, None)
            return None if manifest is None else Receipt(tenant, manifest.version, len(manifest.blocks), 0)

    def usage(self, tenant: str) -> int:
        return sum(b.blob.size for b in self.manifests[tenant].blocks)

    def close(self) -> None: ...
