"""The store's protocol: immutable blobs, and one manifest per tenant that names them.

A commit is: write the block's blob durably, then compare-and-swap the manifest (version v -> v + 1).
Everything else (restart, retries, compaction, history) follows from that. The store knows arrays of bytes
only; what is inside a blob is ``app.memory.codec``'s business.

All methods are synchronous, thread-safe, and durable when they return. They raise the errors of
``app.errors`` named at each method and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import msgspec

FORMAT = 1


class Idempotency(msgspec.Struct, frozen=True):
    """Marks a block as part ``index`` of ``total`` of the update that carried ``key``.

    ``digest`` is a hash of the whole update's contexts, so that the key's reuse with another text is seen.
    """

    key: str
    index: int
    total: int
    digest: str


class BlobRef(msgspec.Struct, frozen=True):
    """One immutable blob: its server-made ``name``, ``size`` in bytes and ``checksum`` (hex) of its bytes."""

    name: str
    size: int
    checksum: str


class BlockRecord(msgspec.Struct, frozen=True):
    """One committed update block. ``version`` is the memory's version after it; ``time`` is Unix seconds.

    ``text`` in a manifest is as the store keeps it, maybe encrypted; ``history`` and ``find`` give it readable.
    """

    version: int
    blob: BlobRef
    time: float
    tokens: int
    text: str | None = None
    idempotency: Idempotency | None = None


class Snapshot(msgspec.Struct, frozen=True):
    """A blob with the whole pool as it was at ``version``."""

    version: int
    blob: BlobRef


class Manifest(msgspec.Struct, frozen=True):
    """All that is known of one tenant. ``blocks`` are those after ``snapshot``, oldest first, no gap.

    Without a snapshot the blocks start at version 1, on the checkpoint's own pool. ``archive`` names blobs
    with the records of older blocks, whose own blobs compaction has dropped (bounded, newest kept).
    """

    tenant: str
    seed: int
    fingerprint: str
    created: float
    version: int = 0
    snapshot: Snapshot | None = None
    blocks: tuple[BlockRecord, ...] = ()
    archive: tuple[BlobRef, ...] = ()
    format: int = FORMAT


class Receipt(msgspec.Struct, frozen=True):
    """What an erasure removed."""

    tenant: str
    version: int
    blobs: int
    bytes: int


class Store(Protocol):
    """Where memories are durable. One server owns a store at a time (or is fenced, see the Redis store)."""

    def tenants(self) -> Iterator[str]:
        """Names of all tenants, sorted; quarantined ones included."""
        ...

    def create(self, manifest: Manifest) -> Manifest:
        """Makes the tenant durable at version 0. Raises TenantExists, StoreFull, StoreFailed."""
        ...

    def load(self, tenant: str) -> Manifest | None:
        """The tenant's manifest, or None. Raises TenantQuarantined (torn or altered manifest), StoreFailed."""
        ...

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        """The blob's bytes, checked. Raises TenantQuarantined (missing, torn or altered), StoreFailed.

        A blob that compaction or erasure took away after the caller had loaded the manifest raises
        VersionConflict or TenantNotFound: load again.
        """
        ...

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
        """Appends one block as version ``expected_version + 1``; durable on return.

        Raises VersionConflict (the manifest is not at ``expected_version``), TenantNotFound,
        TenantQuarantined, StoreFull (nothing changed), StoreFailed (nothing acknowledged).
        """
        ...

    def compact(self, tenant: str, version: int, snapshot: bytes) -> Manifest:
        """Replaces the blocks up to ``version`` by a snapshot of the pool at ``version``; later blocks stay.

        Their records move to the archive; then their blobs are deleted. Up to a version that a snapshot has
        reached already nothing is done. Same errors as ``commit``.
        """
        ...

    def history(self, tenant: str) -> list[BlockRecord]:
        """Records of all blocks still remembered, oldest first, archived ones included (their blobs gone).

        Raises TenantNotFound, TenantQuarantined, StoreFailed, as ``find`` and ``usage`` do.
        """
        ...

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        """The block records, in order, that were committed under an idempotency key (archive included)."""
        ...

    def erase(self, tenant: str) -> Receipt | None:
        """Removes the tenant, manifest first, then every blob; None if absent. Works on quarantined ones.

        Raises StoreFull, StoreFailed if any of it may be left; asking again goes on from there.
        """
        ...

    def usage(self, tenant: str) -> int:
        """Bytes the tenant's manifest and blobs take."""
        ...

    def close(self) -> None: ...
