"""The store on a disk: a directory per tenant, in it immutable blobs and one manifest (DESIGN, section 5).

A commit writes and syncs the blob and its directory, under a name never used before or again, then replaces
the manifest. So does every other change, and deletes afterwards what the new manifest no longer names; a new
tenant is made in ``staging``. The layout is in ``home``, what becomes of a manifest in ``lineages`` and, when
writing it fails, in ``manifests``; older records are in ``histories``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import msgspec

from app.errors import ServiceError, StoreFailed, TenantNotFound, TenantQuarantined, VersionConflict
from app.store import lineages
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Receipt
from app.store.blobs import Blobs, quarantined
from app.store.compaction import Compaction
from app.store.files import Disk, FileSystem, translated
from app.store.histories import Histories
from app.store.home import Home, tenant_id
from app.store.locks import TenantLocks
from app.store.manifests import Manifests
from app.store.records import seal
from app.store.staging import Staging
from app.store.texts import Texts
from app.store.trash import Trash


class DiskStore:
    """See ``app.store.base.Store``; one process owns ``root`` until ``close``.

    ``keep_text=False`` keeps no texts of updates; ``text_key`` (32 bytes) encrypts those that are kept, also
    in the manifests that are returned (``history`` and ``find`` open them). ``history_limit`` bounds the
    records kept of a tenant's older blocks. Another owner has ``patience`` seconds to go. Raises StoreFailed if
    the store cannot be opened, ValueError for a key of another length or a negative limit.
    """

    def __init__(
        self,
        root: Path,
        *,
        keep_text: bool = True,
        text_key: bytes | None = None,
        history_limit: int = 2000,
        patience: float = 5.0,
        files: FileSystem | None = None,
    ) -> None:
        if history_limit < 0:
            raise ValueError("history_limit is at least 0")
        self.root = root
        self.files: FileSystem = files or Disk()
        self._texts = Texts(keep_text, text_key)
        self._locks = TenantLocks()
        self._home = Home(root, self.files, self._texts, patience)
        self._blobs = Blobs(self._home, self.files)
        self._manifests = Manifests(self._home, self.files, self._blobs)
        self._histories = Histories(self._blobs, self._texts, history_limit)
        self._staging = Staging(self._home, self.files, self._manifests)
        self._compaction = Compaction(
            self._locks, self._require, self._blobs, self._histories, self._manifests
        )
        self._trash = Trash(self._home, self.files)
        self._guard = threading.Lock()
        try:
            self._names = self._home.names()
        except BaseException:
            self._home.close()
            raise

    def close(self) -> None:
        """Waits for what is under way, refuses whatever comes later, and lets another server open the store."""
        self._locks.close()
        self._home.close()

    # ------------------------------------------------------------ claims: one process owns every tenant

    def claim(self, tenant: str) -> Manifest | None:
        return self.load(tenant)

    def claimed(self, tenant: str) -> bool:
        return True

    def release(self, tenant: str) -> None: ...

    # ------------------------------------------------------------ reading

    def tenants(self) -> Iterator[str]:
        with self._guard:
            names = sorted(self._names.values())
        return iter(names)

    def load(self, tenant: str) -> Manifest | None:
        self._locks.check()
        # what is cached is durable, and need not wait for a commit under way
        manifest = self._manifests.cached(tenant)
        if manifest is not None:
            return manifest
        with self._locks.holding(tenant):
            return self._load(tenant)

    def _load(self, tenant: str) -> Manifest | None:
        manifest = self._manifests.load(tenant)
        with self._guard:
            if manifest is None:
                self._names.pop(tenant_id(tenant), None)
            else:
                self._names[tenant_id(tenant)] = tenant
        return manifest

    def _require(self, tenant: str) -> Manifest:
        manifest = self._load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return manifest

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        self._locks.check()
        try:
            return self._blobs.read(tenant, blob)
        except FileNotFoundError as error:
            with self._locks.holding(tenant):
                manifest = self._require(tenant)
            if blob not in lineages.blobs_of(manifest):
                raise VersionConflict("the memory has changed meanwhile", retry_after=0.1) from error
            raise quarantined("a blob is missing") from error

    def history(self, tenant: str) -> list[BlockRecord]:
        with self._locks.holding(tenant):
            records = self._histories.records(self._require(tenant))
        return self._histories.readable(records, tenant)

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

        def fill(staged: Path) -> Manifest:
            put = lambda name, data: self._blobs.write(staged, name, data)  # noqa: E731
            return lineages.begun(manifest, *self._beginning(manifest, snapshot, records, put))

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

            def fill(staged: Path) -> Manifest:
                new, copies = lineages.forked(source, target, version, created, self._blobs.new_name, reseal)
                for copy in copies:
                    self._blobs.share(tenant, copy, staged)
                archive = self._histories.archive_of_fork(source, target)
                if archive is None:
                    return new
                name = self._blobs.new_name(lineages.oldest(new), "archive")
                return msgspec.structs.replace(new, archive=(self._blobs.write(staged, name, archive),))

            return self._make(target, fill)

    def _make(self, tenant: str, fill: Callable[[Path], Manifest]) -> Manifest:
        manifest = self._staging.make(tenant, fill)
        with self._guard:
            self._names[tenant_id(tenant)] = tenant
        return manifest

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
    ) -> Manifest:
        with self._locks.holding(tenant):
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage)
            version = expected_version + 1
            sealed = self._texts.seal(text, tenant, version)
            with translated("writing a block"):
                ref = self._blobs.put(tenant, self._blobs.new_name(version, "block"), blob)
            record = BlockRecord(version, ref, time, tokens, sealed, idempotency)
            return self._manifests.swap(old, lineages.committed(old, record), [ref])

    def rollback(self, tenant: str, version: int, *, expected_version: int) -> Manifest:
        with self._locks.holding(tenant):
            old = self._require(tenant)
            lineages.require_version(old, expected_version)
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

    def compact(self, tenant: str, version: int, snapshot: bytes, *, lineage: int | None = None) -> Manifest:
        return self._compaction.run(tenant, version, snapshot, lineage)

    # ------------------------------------------------------------ erasing

    def erase(self, tenant: str) -> Receipt | None:
        """Raises StoreFull or StoreFailed if anything may be left; asking again goes on from there."""
        with self._locks.holding(tenant):
            receipt = self._trash.empty(tenant)
            with translated("erasing a tenant"):
                there = self.files.exists(self._home.directory(tenant))
            if there:
                manifest = None
                with suppress(TenantQuarantined, StoreFailed):
                    manifest = self._load(tenant)
                # from here on the disk is asked, never the memory
                self._manifests.forget(tenant)
                try:
                    self._trash.put(tenant, manifest)
                    receipt = self._trash.empty(tenant)
                except ServiceError:
                    if self._trash.holds(tenant):
                        self._manifests.doubt(tenant)
                    raise
            with self._guard:
                self._names.pop(tenant_id(tenant), None)
            return receipt
