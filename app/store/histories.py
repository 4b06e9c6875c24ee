"""What a tenant's blocks are remembered by: the manifest's records and, of older ones, the archive's."""

from __future__ import annotations

from collections.abc import Sequence

from app.store.archive import ArchiveIndex, archived, extend
from app.store.base import BlobRef, BlockRecord, Manifest
from app.store.parts import Blobs, quarantined
from app.store.records import Damaged, seal
from app.store.texts import Texts


class Histories:
    """Called under the tenant's lock. ``limit`` bounds the records kept of a tenant's older blocks.

    All methods that read an archive raise TenantQuarantined, StoreFailed.
    """

    def __init__(self, blobs: Blobs, texts: Texts, limit: int) -> None:
        self._blobs = blobs
        self._texts = texts
        self._limit = limit
        self._index = ArchiveIndex()

    def records(self, manifest: Manifest) -> list[BlockRecord]:
        """All records still remembered, oldest first, their texts as they are kept."""
        return [*self._archived(manifest), *manifest.blocks]

    def readable(self, records: Sequence[BlockRecord], tenant: str) -> list[BlockRecord]:
        return [self._texts.open(record, tenant) for record in records]

    def find(self, manifest: Manifest, key: str) -> list[BlockRecord]:
        """The records under an idempotency key, their texts as they are kept."""
        # all of the archive's keys: how many of its records count depends on the blocks, which a rollback takes
        records: Sequence[BlockRecord] = manifest.blocks
        if self._index.may_hold(manifest, key, lambda: self._all_archived(manifest)):
            records = self.records(manifest)
        return [r for r in records if r.idempotency is not None and r.idempotency.key == key]

    def times(self, manifest: Manifest) -> list[float]:
        """When the blocks of ``records`` were committed."""
        times = self._index.times(manifest, lambda: self._all_archived(manifest))
        return [*times[self._hidden(manifest, len(times)) :], *(block.time for block in manifest.blocks)]

    # ------------------------------------------------------------ archives

    def _segment(self, tenant: str, ref: BlobRef) -> memoryview:
        try:
            return self._blobs.read(tenant, ref)
        except FileNotFoundError as error:
            raise quarantined("a part of its archive is missing", ref.name) from error

    def _all_archived(self, manifest: Manifest) -> list[BlockRecord]:
        try:
            return archived(manifest, lambda ref: self._segment(manifest.tenant, ref))
        except Damaged as error:
            raise quarantined("its archive is damaged", _names(manifest)) from error

    def _archived(self, manifest: Manifest) -> list[BlockRecord]:
        """The records still remembered of blocks before the snapshot, oldest first."""
        records = self._all_archived(manifest)
        return records[self._hidden(manifest, len(records)) :]

    def _hidden(self, manifest: Manifest, count: int) -> int:
        """How many of the archive's ``count`` records, the oldest, are over the limit beside the manifest's."""
        return max(0, count - max(0, self._limit - len(manifest.blocks)))

    def extended(
        self, old: Manifest, gone: list[BlockRecord]
    ) -> tuple[tuple[BlobRef, ...], list[BlockRecord]]:
        """The archive's segments to keep and the records of the one to add, once the blocks ``gone`` go."""
        try:
            return extend(old, gone, self._limit, lambda ref: self._segment(old.tenant, ref))
        except Damaged as error:
            raise quarantined("its archive is damaged", _names(old)) from error

    def beginning(self, tenant: str, records: Sequence[BlockRecord]) -> bytes | None:
        """The archive that a new memory begins with, of readable records; None if there is none to keep."""
        kept = records[-self._limit :] if self._limit else []
        return seal([self._texts.sealed(record, tenant) for record in kept]) if kept else None

    def reseal(self, record: BlockRecord, tenant: str, target: str) -> BlockRecord:
        """``tenant``'s record as ``target`` keeps it. Raises StoreFailed if it cannot be decrypted."""
        return self._texts.sealed(self._texts.open(record, tenant), target)

    def archive_of_fork(self, source: Manifest, target: str) -> bytes | None:
        """``source``'s archive in one piece, sealed anew; None if it has none."""
        return self.beginning(target, self.readable(self._all_archived(source), source.tenant))


def _names(manifest: Manifest) -> str:
    """Of the archive's files; which of them it is that cannot be read is not told."""
    return " ".join(ref.name for ref in manifest.archive)
