"""The store's protocol: immutable blobs, and one manifest per tenant that names them.

A commit is: write the block's blob durably, then compare-and-swap the manifest (version v -> v + 1).
Everything else (restart, retries, compaction, history, fork, rollback) follows from that; what each makes of
a manifest is in ``app.store.lineages``. The store knows arrays of bytes only; what is inside a blob is
``app.memory.codec``'s business.

(lineage, version) together name one content of a tenant's memory, as long as the tenant lives.

All methods are synchronous, thread-safe, and durable when they return. They raise the errors of
``app.errors`` named at each method and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from app.store.reading import BlobReader

FORMAT = 1
# names one claim of a tenant, see Store.claimed
ClaimMark = bytes


class Idempotency(msgspec.Struct, frozen=True):
    """Marks a block as part ``index`` of ``total`` of the update that carried ``key``.

    ``digest`` is a hash of the whole update's contexts, so that the key's reuse with another text is seen.
    """

    key: str
    index: int
    total: int
    digest: str


class BlobRef(msgspec.Struct, frozen=True):
    """One immutable blob: its server-made ``name``, ``size`` in bytes and ``checksum`` (see ``records.BlobSum``)."""

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
    ``lineage`` is raised by one by every rollback and rebuild, after which a version may come a second time
    with another content. Manifests of before there were lineages have none: theirs is 0. ``undone`` are the times of
    blocks that rollbacks took away, of the last day before the newest of them.
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
    lineage: int = 0
    # not written where there is none: what is stored must be what its manifest is sealed to again
    undone: tuple[float, ...] | msgspec.UnsetType = msgspec.UNSET


def content(manifest: Manifest) -> tuple[float, int, int]:
    """(created, lineage, version): names one content, also among those of tenants of this name that were erased."""
    return manifest.created, manifest.lineage, manifest.version


class Receipt(msgspec.Struct, frozen=True):
    """What an erasure removed."""

    tenant: str
    version: int
    blobs: int
    bytes: int


class Store(Protocol):
    """Where memories are durable. One server owns a store at a time (or is fenced, see the Redis store)."""

    def tenants(self, only: Sequence[str] | None = None) -> Iterator[str]:
        """Names of all tenants, sorted; quarantined ones included.

        With ``only``, which has names and beginnings with a ``*`` behind them, those of them that are there: the others
        are not looked at, however many there are.
        """
        ...

    def claim(self, tenant: str) -> Manifest | None:
        """Makes this server the tenant's only writer until the claim lapses; gives its manifest as it is now.

        None if there is no such tenant; it is claimed all the same, so that it can be made. Cheap if the claim
        is held already. A disk store owns all its tenants. Raises TenantElsewhere (another server has it),
        TenantQuarantined, StoreFailed.
        """
        ...

    def claimed(self, tenant: str) -> ClaimMark | None:
        """The mark of the claim while it surely holds, else None. The tenant is in use here from then on. No I/O,
        never waits long.

        While the mark stays the same nobody else has changed the tenant; a claim that lapsed and was taken anew has
        another, whoever here took it. A disk store: always the same.
        """
        ...

    def holds(self, tenant: str) -> bool:
        """Whether the claim surely holds, for one who only looks: unlike ``claimed`` it does not say that the tenant is
        in use here. No I/O, raises nothing."""
        ...

    def release(self, tenant: str) -> None:
        """Nothing of the tenant's is open here any more: another server may have it. No I/O, raises nothing."""
        ...

    def create(
        self, manifest: Manifest, snapshot: bytes | None = None, records: Sequence[BlockRecord] = ()
    ) -> Manifest:
        """Makes the tenant durable, all of it at once. ``manifest`` names no blobs.

        Without ``snapshot`` it is at version 0. With one (an import) it begins at ``manifest.version`` with the
        pool that ``snapshot`` encodes, and with ``records`` (oldest first, versions rising, at most that
        version, texts readable, their blobs gone) as its archive, of which the newest are kept up to the
        store's limit; their idempotency keys are found. Raises TenantExists, StoreFull, StoreFailed;
        ValueError for a manifest with blobs, a version without a snapshot, or records out of order.
        """
        ...

    def fork(self, tenant: str, target: str, *, version: int | None = None, created: float) -> Manifest:
        """Makes the tenant ``target`` with the memory that ``tenant`` has at ``version`` (None: its current one).

        Seed, fingerprint and history up to there are the same, idempotency keys included; lineage 0, ``created``
        as given; the blobs get names of their own. Texts are sealed anew, since their encryption is bound
        to the tenant; a store that keeps no texts leaves them out. Afterwards neither tenant depends on the
        other: each may be changed and erased. All of ``target`` appears at once or nothing.

        A disk shares the blobs by hard links (or copies them where it has none; ``tenant``'s changes wait
        meanwhile). What the blobs hold is not read, but each must be there in its full size.

        Raises TenantNotFound, TenantQuarantined (``tenant``, or its archive, or a blob is missing),
        TenantExists (``target``; ``tenant`` itself too), VersionNotKept, StoreFull, StoreFailed.
        """
        ...

    def rollback(
        self,
        tenant: str,
        version: int,
        *,
        expected_version: int,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        """Goes back to a kept version: later blocks, their records and keys go, lineage + 1, durable on return.

        Kept are the versions from the snapshot's (without one: 0) to the current one. To go back to that
        raises the lineage all the same. ``lineage`` and ``created`` as for ``commit``. Raises VersionConflict (the
        manifest is not at ``expected_version``, or of another lineage or memory), VersionNotKept, TenantNotFound,
        TenantQuarantined, StoreFull (nothing changed), StoreFailed.
        """
        ...

    def replace(
        self,
        tenant: str,
        old: Manifest,
        new: Manifest,
        snapshot: bytes | None,
        records: Sequence[BlockRecord],
    ) -> Manifest:
        """Swaps the whole memory for another, as a rebuild needs it, in one swap of the manifest.

        ``new`` (same tenant; any seed, fingerprint and version), ``snapshot`` and ``records`` are as for
        ``create``; its lineage becomes the current one + 1. Then the old blobs are deleted. Raises
        VersionConflict if the memory is no longer the one that ``old`` describes (a compaction meanwhile does
        no harm), otherwise as ``commit``; ValueError as ``create``.
        """
        ...

    def load(self, tenant: str) -> Manifest | None:
        """The tenant's manifest, or None. Raises TenantQuarantined (torn or altered manifest), StoreFailed."""
        ...

    def read(self, tenant: str, blob: BlobRef) -> memoryview:
        """The blob's bytes, checked, in memory that is the caller's.

        Raises TenantQuarantined (missing, torn or altered), StoreFailed.

        A blob that compaction, rollback, rebuild or erasure took away after the caller had loaded the manifest
        raises VersionConflict or TenantNotFound: load again.
        """
        ...

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None:
        """These are read next, in this order: a store that can has the first of their bytes fetched meanwhile.

        Waits for none of them, raises nothing.
        """
        ...

    def reader(self, tenant: str, blob: BlobRef) -> BlobReader:
        """The blob piece by piece, for one who has no room for all of it. It is checked when all has been taken.

        Raises as ``read``, and so does what it returns.
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
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        """Appends one block as version ``expected_version + 1``; durable on return.

        ``lineage`` and ``created`` are those of the memory that the block was computed in (None: not compared).
        Raises VersionConflict (the manifest is not at ``expected_version``, or of another lineage or memory),
        TenantNotFound, TenantQuarantined, StoreFull (nothing changed), StoreFailed (nothing acknowledged).
        """
        ...

    def compact(
        self,
        tenant: str,
        version: int,
        snapshot: bytes,
        *,
        lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:
        """Replaces the blocks up to ``version`` by a snapshot of the pool at ``version``; later blocks stay.

        Their records move to the archive; then their blobs are deleted. Up to a version that a snapshot has
        reached already nothing is done. ``lineage`` and ``created`` are those of the memory that the snapshot
        was made of (None: not compared). VersionConflict if a rollback, a rebuild or an erasure has come before
        it, even while the snapshot was being written; otherwise the same errors as ``commit``.
        """
        ...

    def history(self, tenant: str) -> list[BlockRecord]:
        """Records of all blocks still remembered, oldest first, archived ones included (their blobs gone).

        Raises TenantNotFound, TenantQuarantined, StoreFailed, as ``times``, ``find`` and ``usage`` do.
        """
        ...

    def times(self, tenant: str) -> list[float]:
        """Those of the records that ``history`` gives, in its order; cheap, since no text is opened for them."""
        ...

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        """The block records, in order, that were committed under an idempotency key (archive included)."""
        ...

    def erase(self, tenant: str) -> Receipt | None:
        """Removes the tenant, manifest first, then every blob; None if absent. Works on quarantined ones.

        Raises StoreFull, StoreFailed if any of it may be left; asking again goes on from there. What a fork
        shares with it stays the fork's.
        """
        ...

    def usage(self, tenant: str) -> int:
        """Bytes the tenant's manifest and blobs take; those shared with a fork count for each."""
        ...

    def close(self) -> None: ...
