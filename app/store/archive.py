"""Records of blocks that compaction has dropped: a few immutable blobs per tenant, bounded in number.

Each compaction adds one segment. When there are ``MOST_SEGMENTS``, the next one merges all, so that a record
is rewritten once in that many compactions, and at most ``limit`` records are ever carried along.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

from app.store.base import BlobRef, BlockRecord, Manifest
from app.store.records import unseal

MOST_SEGMENTS = 8
_CACHED_KEYS = 200_000

ReadBlob = Callable[[BlobRef], memoryview]


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


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


class ArchivedKeys:
    """Which idempotency keys a tenant's archive may hold, so that a new key costs no reading.

    8 bytes a key, for the tenants asked about last; an entry is good for exactly one archive.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: OrderedDict[str, tuple[tuple[BlobRef, ...], frozenset[bytes]]] = OrderedDict()
        self._size = 0

    def may_hold(self, manifest: Manifest, key: str, records: Callable[[], Iterable[BlockRecord]]) -> bool:
        """``records`` yields the archive's, and is called only if it is not known."""
        if not manifest.archive:
            return False
        with self._guard:
            known = self._known.get(manifest.tenant)
            if known is not None and known[0] == manifest.archive:
                self._known.move_to_end(manifest.tenant)
                return _digest(key) in known[1]
        digests = frozenset(_digest(r.idempotency.key) for r in records() if r.idempotency is not None)
        with self._guard:
            self._drop(manifest.tenant)
            self._known[manifest.tenant] = (manifest.archive, digests)
            # an entry without keys takes room as well
            self._size += len(digests) + 1
            while self._size > _CACHED_KEYS:
                self._drop(next(iter(self._known)))
        return _digest(key) in digests

    def _drop(self, tenant: str) -> None:
        known = self._known.pop(tenant, None)
        if known is not None:
            self._size -= len(known[1]) + 1
