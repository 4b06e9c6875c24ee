"""Records of blocks that compaction has dropped: a few immutable blobs per tenant, bounded in number.

Each compaction adds one segment. When there are ``MOST_SEGMENTS``, the next one merges all, so that a record
is rewritten once in that many compactions, and at most ``limit`` records are ever carried along.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.store.base import BlobRef, BlockRecord, Manifest
from app.store.records import unseal

MOST_SEGMENTS = 8
# of all tenants together: some 2,200 with archives of 2,300 records
_CACHED_BYTES = 64 * 2**20
# what an entry takes besides, with the tenant's name, and the reference to each of its segments
_ENTRY_BYTES, _SEGMENT_BYTES = 700, 300

ReadBlob = Callable[[BlobRef], memoryview]
# the records of a tenant's archive, oldest first; called only if they are not known
ReadArchive = Callable[[], Sequence[BlockRecord]]


def archived(manifest: Manifest, read: ReadBlob) -> list[BlockRecord]:
    """All records in the archive, oldest first. Raises Damaged and what ``read`` raises."""
    return [r for ref in manifest.archive for r in unseal(read(ref), list[BlockRecord])]


def extend(
    manifest: Manifest, gone: list[BlockRecord], limit: int, read: ReadBlob
) -> tuple[tuple[BlobRef, ...], list[BlockRecord]]:
    """The segments to keep, and the records of the one to write behind them (none: write none)."""
    kept = manifest.archive
    if len(kept) >= MOST_SEGMENTS:
        gone, kept = [*archived(manifest, read), *gone], ()
    return kept, gone[-limit:] if limit else []


def _digest(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest())


@dataclass(frozen=True)
class _Known:
    """Of exactly this archive: the digests of its keys, sorted, each once, and its records' times, oldest first."""

    archive: tuple[BlobRef, ...]
    digests: array[int]
    times: array[float]

    @property
    def bytes(self) -> int:
        held = self.digests.itemsize * len(self.digests) + self.times.itemsize * len(self.times)
        return held + _ENTRY_BYTES + _SEGMENT_BYTES * len(self.archive)

    def may_hold(self, digest: int) -> bool:
        at = bisect_left(self.digests, digest)
        return at < len(self.digests) and self.digests[at] == digest


class ArchiveIndex:
    """What is asked of a tenant's archive at each update, so that this costs no reading: which idempotency keys it may
    hold, and when its blocks were committed.

    4 bytes a key (two keys of one digest cost a reading, no more) and 8 a time, for the tenants asked about last.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._bytes = 0

    def may_hold(self, manifest: Manifest, key: str, records: ReadArchive) -> bool:
        return bool(manifest.archive) and self._of(manifest, records).may_hold(_digest(key))

    def times(self, manifest: Manifest, records: ReadArchive) -> Sequence[float]:
        """Unix seconds, of all records in the archive, oldest first."""
        return self._of(manifest, records).times if manifest.archive else ()

    def _of(self, manifest: Manifest, records: ReadArchive) -> _Known:
        with self._guard:
            known = self._known.get(manifest.tenant)
            if known is not None and known.archive == manifest.archive:
                self._known.move_to_end(manifest.tenant)
                return known
        read = records()
        digests = {_digest(r.idempotency.key) for r in read if r.idempotency is not None}
        known = _Known(manifest.archive, array("I", sorted(digests)), array("d", [r.time for r in read]))
        with self._guard:
            self._drop(manifest.tenant)
            self._known[manifest.tenant] = known
            self._bytes += known.bytes
            while self._bytes > _CACHED_BYTES:
                self._drop(next(iter(self._known)))
        return known

    def _drop(self, tenant: str) -> None:
        known = self._known.pop(tenant, None)
        if known is not None:
            self._bytes -= known.bytes
