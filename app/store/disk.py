"""The store on a disk: a directory per tenant, in it immutable blobs and one manifest (DESIGN, section 5).

A commit writes and syncs the blob and its directory, under a name never used before or again, then replaces
the manifest. The layout is in ``home``, the manifest's fate in ``manifests``, older records in ``archive``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from app.errors import (
    ServiceError,
    StoreFailed,
    TenantExists,
    TenantNotFound,
    TenantQuarantined,
    VersionConflict,
)
from app.store.archive import ArchivedKeys, archived, extend
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Receipt, Snapshot
from app.store.blobs import Blobs, quarantined
from app.store.files import Disk, FileSystem, failure, is_there, remove_tree, translated, write_synced
from app.store.home import Home, tenant_id
from app.store.locks import TenantLocks
from app.store.manifests import Manifests
from app.store.records import Damaged, blobs_of, seal
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
        self._history_limit = history_limit
        self._locks = TenantLocks()
        self._home = Home(root, self.files, self._texts, patience)
        self._blobs = Blobs(self._home, self.files)
        self._manifests = Manifests(self._home, self.files, self._blobs)
        self._trash = Trash(self._home, self.files)
        self._keys = ArchivedKeys()
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
            if blob not in blobs_of(manifest):
                raise VersionConflict("the memory has been compacted meanwhile", retry_after=0.1) from error
            raise quarantined("a blob is missing") from error

    # ------------------------------------------------------------ writing

    def create(self, manifest: Manifest) -> Manifest:
        if manifest.version or manifest.snapshot or manifest.blocks or manifest.archive:
            raise ValueError("a tenant is created at version 0, without blobs")
        tenant, directory = manifest.tenant, self._home.directory(manifest.tenant)
        staged = self._home.new_staging()
        with self._locks.holding(tenant), translated("creating a tenant"):
            if self.files.exists(directory):
                raise TenantExists("this tenant exists already")
            try:
                if not self.files.exists(directory.parent):
                    with suppress(FileExistsError):
                        self.files.make_directory(directory.parent)
                # always: another thread may have made it and not synced it yet
                self.files.sync_directory(self._home.tenants)
                self.files.make_directory(staged)
                write_synced(self.files, staged / "name", seal(tenant))
                write_synced(self.files, staged / "manifest", seal(manifest))
                self.files.sync_directory(staged)
                self.files.rename(staged, directory)
                self.files.sync_directory(directory.parent)
            except OSError as error:
                with suppress(OSError):
                    remove_tree(self.files, staged)
                if is_there(self.files, directory):
                    self._manifests.doubt(tenant)
                    raise StoreFailed("the store failed while creating a tenant") from error
                raise
            self._manifests.remember(manifest)
            with self._guard:
                self._names[tenant_id(tenant)] = tenant
            return manifest

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
        with self._locks.holding(tenant):
            old = self._require(tenant)
            if old.version != expected_version:
                raise VersionConflict(
                    f"the memory is at version {old.version}, not {expected_version}", retry_after=0.1
                )
            version = expected_version + 1
            sealed = self._texts.seal(text, tenant, version)
            with translated("writing a block"):
                ref = self._blobs.put(tenant, self._blobs.new_name(version, "block"), blob)
            record = BlockRecord(version, ref, time, tokens, sealed, idempotency)
            new = msgspec.structs.replace(old, version=version, blocks=(*old.blocks, record))
            self._manifests.swap(old, new, [ref])
            return new

    def compact(self, tenant: str, version: int, snapshot: bytes) -> Manifest:
        with self._locks.holding(tenant):
            old = self._require(tenant)
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
                return self._replace_blocks(tenant, last, Snapshot(version, ref))

    def _replace_blocks(self, tenant: str, last: BlockRecord, snapshot: Snapshot) -> Manifest:
        """Swaps the manifest for one with ``snapshot`` in place of the blocks up to ``last``."""
        fresh = [snapshot.blob]
        try:
            old = self._require(tenant)
            if last not in old.blocks:
                # compacted further, or erased and made anew, while the snapshot was written
                if old.snapshot is None or old.snapshot.version < last.version:
                    raise VersionConflict("the memory has changed meanwhile", retry_after=0.1)
                self._blobs.discard(tenant, [snapshot.blob.name])
                return old
            gone = [block for block in old.blocks if block.version <= last.version]
            segments, records = self._extended(old, gone)
            if records:
                with translated("writing the archive"):
                    name = self._blobs.new_name(last.version, "archive")
                    fresh.append(self._blobs.put(tenant, name, seal(records)))
        except ServiceError:
            self._blobs.discard(tenant, [ref.name for ref in fresh])
            raise
        new = msgspec.structs.replace(
            old,
            snapshot=snapshot,
            blocks=tuple(block for block in old.blocks if block.version > last.version),
            archive=(*segments, *fresh[1:]),
        )
        self._manifests.swap(old, new, fresh)
        kept = {ref.name for ref in blobs_of(new)}
        self._blobs.discard(tenant, [ref.name for ref in blobs_of(old) if ref.name not in kept])
        return new

    # ------------------------------------------------------------ history

    def _segment(self, tenant: str, ref: BlobRef) -> bytes:
        try:
            return self._blobs.read(tenant, ref)
        except FileNotFoundError as error:
            raise quarantined("a part of its archive is missing") from error

    def _extended(
        self, old: Manifest, gone: list[BlockRecord]
    ) -> tuple[tuple[BlobRef, ...], list[BlockRecord]]:
        try:
            return extend(old, gone, self._history_limit, lambda ref: self._segment(old.tenant, ref))
        except Damaged as error:
            raise quarantined("its archive is damaged") from error

    def _archived(self, manifest: Manifest) -> list[BlockRecord]:
        """The records still remembered of blocks before the snapshot, oldest first."""
        try:
            records = archived(manifest, lambda ref: self._segment(manifest.tenant, ref))
        except Damaged as error:
            raise quarantined("its archive is damaged") from error
        return records[max(0, len(records) - max(0, self._history_limit - len(manifest.blocks))) :]

    def history(self, tenant: str) -> list[BlockRecord]:
        with self._locks.holding(tenant):
            manifest = self._require(tenant)
            records = [*self._archived(manifest), *manifest.blocks]
        return [self._texts.open(record, tenant) for record in records]

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        with self._locks.holding(tenant):
            manifest = self._require(tenant)
            records = list(manifest.blocks)
            if self._keys.may_hold(manifest, key, lambda: self._archived(manifest)):
                records = [*self._archived(manifest), *records]
        return [
            self._texts.open(record, tenant)
            for record in records
            if record.idempotency is not None and record.idempotency.key == key
        ]

    def usage(self, tenant: str) -> int:
        manifest = self.load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return len(seal(manifest)) + sum(ref.size for ref in blobs_of(manifest))

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
