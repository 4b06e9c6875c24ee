"""Compaction: a snapshot takes the place of the blocks up to its version, commits going on meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from app.errors import ServiceError, VersionConflict
from app.store import lineages
from app.store.base import BlockRecord, Manifest, Snapshot
from app.store.files import failure, translated
from app.store.histories import Histories
from app.store.locks import TenantLocks
from app.store.parts import Blobs, Manifests
from app.store.records import seal


class Compaction:
    """``require`` gives a tenant's manifest, under its lock, or raises."""

    def __init__(
        self,
        locks: TenantLocks,
        require: Callable[[str], Manifest],
        blobs: Blobs,
        histories: Histories,
        manifests: Manifests,
    ) -> None:
        self._locks = locks
        self._require = require
        self._blobs = blobs
        self._histories = histories
        self._manifests = manifests

    def run(
        self, tenant: str, version: int, snapshot: bytes, lineage: int | None, created: float | None
    ) -> Manifest:
        """See ``Store.compact``."""
        with self._locks.holding(tenant):
            old = self._require(tenant)
        lineages.require_lineage(old, lineage, created)
        if version > old.version:
            raise VersionConflict(f"the memory is at version {old.version}, not yet at {version}")
        last = next((block for block in old.blocks if block.version == version), None)
        if last is None:
            return old
        name = self._blobs.new_name(version, "snapshot")
        # a whole pool takes its time to write, and commits go on meanwhile
        with self._blobs.coming(name):
            try:
                ref = self._blobs.put(tenant, name, snapshot)
            except OSError as error:
                with self._locks.holding(tenant):
                    self._require(tenant)
                raise failure(error, "writing a snapshot") from error
            with self._locks.holding(tenant):
                return self._swap(tenant, old, last, Snapshot(version, ref))

    def _swap(self, tenant: str, begun: Manifest, last: BlockRecord, snapshot: Snapshot) -> Manifest:
        """Puts ``snapshot`` in the place of the blocks up to ``last``, if they are still what it was made of."""
        fresh = [snapshot.blob]
        try:
            old = self._require(tenant)
            lineages.require_lineage(old, begun.lineage, begun.created)
            if last not in old.blocks:
                # compacted further, or erased and made anew, while the snapshot was written
                if lineages.oldest(old) < last.version:
                    raise VersionConflict("the memory has changed meanwhile", retry_after=0.1)
                self._blobs.discard(tenant, [snapshot.blob.name])
                return old
            gone = [block for block in old.blocks if block.version <= last.version]
            segments, records = self._histories.extended(old, gone)
            if records:
                with translated("writing the archive"):
                    name = self._blobs.new_name(last.version, "archive")
                    fresh.append(self._blobs.put(tenant, name, seal(records)))
        except ServiceError:
            self._blobs.discard(tenant, [ref.name for ref in fresh])
            raise
        return self._manifests.swap(old, lineages.compacted(old, snapshot, [*segments, *fresh[1:]]), fresh)
