"""What every store does with manifests and blobs, whatever keeps them: the operations of ``Store``.

A change writes its blobs durably, under names never used before or again, then swaps the manifest, and deletes
afterwards what the new manifest no longer names. What becomes of a manifest is in ``lineages``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NoReturn

import msgspec

from app.errors import ServiceError, TenantNotFound, VersionConflict
from app.store import lineages
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest
from app.store.compaction import Compaction
from app.store.files import translated
from app.store.histories import Histories
from app.store.locks import TenantLocks
from app.store.parts import Blobs, Manifests, Place, quarantined
from app.store.reading import BlobReader
from app.store.records import seal
from app.store.texts import Texts


class Operations(ABC):
    """The operations of ``app.store.base.Store`` on the parts a store is made of.

    A store adds ``_load`` (the manifest, under the tenant's lock), ``_make`` (a tenant, from what ``fill`` puts into
    its place), erasing, listing and claims.
    """

    def __init__(
        self,
        blobs: Blobs,
        manifests: Manifests,
        texts: Texts,
        locks: TenantLocks,
        history_limit: int,
    ) -> None:
        self._texts, self._locks = texts, locks
        self._blobs, self._manifests = blobs, manifests
        self._histories = Histories(blobs, texts, history_limit)
        self._compaction = Compaction(locks, self._require, blobs, self._histories, manifests)

    @abstractmethod
    def _load(self, tenant: str) -> Manifest | None: ...

    def _look(self, tenant: str) -> Manifest | None:
        """As ``_load``, by one who only reads."""
        return self._load(tenant)

    @abstractmethod
    def _make(self, tenant: str, fill: Callable[[Place], Manifest]) -> Manifest: ...

    # ------------------------------------------------------------ reading

    def load(self, tenant: str) -> Manifest | None:
        self._locks.check()
        # what is cached is durable, and need not wait for a commit under way
        manifest = self._manifests.cached(tenant)
        if manifest is not None:
            return manifest
        with self._locks.holding(tenant):
            return self._load(tenant)

    def _require(self, tenant: str) -> Manifest:
        manifest = self._load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return manifest

    def read(self, tenant: str, blob: BlobRef) -> memoryview:
        self._locks.check()
        try:
            return self._blobs.read(tenant, blob)
        except FileNotFoundError as error:
            self._gone(tenant, blob, error)

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None:
        self._blobs.expect(tenant, blobs)

    def reader(self, tenant: str, blob: BlobRef) -> BlobReader:
        self._locks.check()
        try:
            source = self._blobs.reader(tenant, blob)
        except FileNotFoundError as error:
            self._gone(tenant, blob, error)
        return BlobReader(blob, source, lambda error: self._gone(tenant, blob, error))

    def _gone(self, tenant: str, blob: BlobRef, error: OSError) -> NoReturn:
        """Says what it means that a blob is missing."""
        with self._locks.holding(tenant):
            manifest = self._look(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant") from error
        if blob not in lineages.blobs_of(manifest):
            raise VersionConflict("the memory has changed meanwhile", retry_after=0.1) from error
        raise quarantined("a blob is missing", blob.name) from error

    def history(self, tenant: str) -> list[BlockRecord]:
        with self._locks.holding(tenant):
            records = self._histories.records(self._require(tenant))
        return self._histories.readable(records, tenant)

    def times(self, tenant: str) -> list[float]:
        with self._locks.holding(tenant):
            return self._histories.times(self._require(tenant))

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        with self._locks.holding(tenant):
            records = self._histories.find(self._require(tenant), key)
        return self._histories.readable(records, tenant)

    def usage(self, tenant: str) -> int:
        manifest = self.load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return len(seal(manifest)) + sum(ref.size for ref in lineages.blobs_of(manifest))

    # ------------------------------------------------------------ making tenants

    def create(
        self, manifest: Manifest, snapshot: bytes | None = None, records: Sequence[BlockRecord] = ()
    ) -> Manifest:
        lineages.require_beginning(manifest, snapshot, records)

        def fill(place: Place) -> Manifest:
            return lineages.begun(manifest, *self._beginning(manifest, snapshot, records, place.put))

        with self._locks.holding(manifest.tenant):
            return self._make(manifest.tenant, fill)

    def fork(self, tenant: str, target: str, *, version: int | None = None, created: float) -> Manifest:
        with ExitStack() as locks:
            # in one order for all, so that two forks never wait for each other
            for name in sorted({tenant, target}):
                locks.enter_context(self._locks.holding(name))
            source = self._require(tenant)

            def reseal(record: BlockRecord) -> BlockRecord:
                return self._histories.reseal(record, tenant, target)

            def fill(place: Place) -> Manifest:
                new, copies = lineages.forked(source, target, version, created, self._blobs.new_name, reseal)
                for copy in copies:
                    place.share(tenant, copy)
                archive = self._histories.archive_of_fork(source, target)
                if archive is None:
                    return new
                name = self._blobs.new_name(lineages.oldest(new), "archive")
                return msgspec.structs.replace(new, archive=(place.put(name, archive),))

            return self._make(target, fill)

    def _beginning(
        self,
        manifest: Manifest,
        snapshot: bytes | None,
        records: Sequence[BlockRecord],
        put: Callable[[str, bytes], BlobRef],
    ) -> tuple[BlobRef | None, list[BlobRef]]:
        """Puts the snapshot and the archive that a memory begins with, and returns them."""
        name = self._blobs.new_name
        first = None if snapshot is None else put(name(manifest.version, "snapshot"), snapshot)
        archive = self._histories.beginning(manifest.tenant, records)
        return first, [] if archive is None else [put(name(manifest.version, "archive"), archive)]

    # ------------------------------------------------------------ changing them

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
        with self._locks.holding(tenant):
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage, created)
            version = expected_version + 1
            sealed = self._texts.seal(text, tenant, version)
            with translated("writing a block"):
                ref = self._blobs.put_block(tenant, version, blob)
            record = BlockRecord(version, ref, time, tokens, sealed, idempotency)
            return self._manifests.swap(old, lineages.committed(old, record), [ref])

    def rollback(
        self,
        tenant: str,
        version: int,
        *,
        expected_version: int,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        with self._locks.holding(tenant):
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage, created)
            return self._manifests.swap(old, lineages.rolled_back(old, version), [])

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
            raise ValueError("a memory is replaced by one of the same tenant")
        fresh: list[BlobRef] = []

        def put(name: str, data: bytes) -> BlobRef:
            with translated("writing a memory"):
                fresh.append(self._blobs.put(tenant, name, data))
            return fresh[-1]

        with self._locks.holding(tenant):
            current = self._require(tenant)
            lineages.require_same(current, old)
            try:
                begun = self._beginning(new, snapshot, records, put)
            except ServiceError:
                self._blobs.discard(tenant, [ref.name for ref in fresh])
                raise
            return self._manifests.swap(current, lineages.replaced(current, new, *begun), fresh)

    def compact(
        self,
        tenant: str,
        version: int,
        snapshot: bytes,
        *,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        return self._compaction.run(tenant, version, snapshot, lineage, created)
