"""The store on a disk: a directory per tenant, in it immutable blobs and one manifest (DESIGN, section 5).

    LOCK, FORMAT
    tenants/<2 hex>/<id>/{name, manifest, <version>-<random>.{block,snapshot,archive}}
    staging/, trash/        half-made and half-erased tenants; emptied at start

The id is a hash of the tenant's name; the name as typed never reaches a path. A blob's name is never used
twice. A commit syncs the blob and its directory, then replaces the manifest; what no manifest names is
removed when the tenant is first touched after a start.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from app.errors import (
    StoreFailed,
    StoreFull,
    TenantExists,
    TenantNotFound,
    TenantQuarantined,
    VersionConflict,
)
from app.store.base import BlobRef, BlockRecord, Idempotency, Manifest, Receipt, Snapshot
from app.store.files import Disk, FileSystem, failure, replace_durably
from app.store.records import Damaged, TextCipher, checksum, seal, unseal, unseal_manifest

STORE_FORMAT = "memoryllm-store 1"
_MOST_SEGMENTS = 8
_CACHED = 1024


class DiskStore:
    """See ``app.store.base.Store``. ``history_limit`` bounds the records kept of a tenant's older blocks."""

    def __init__(
        self,
        root: Path,
        *,
        keep_text: bool = True,
        text_key: bytes | None = None,
        history_limit: int = 2000,
        files: FileSystem | None = None,
    ) -> None:
        self.root = root
        self.files: FileSystem = files or Disk()
        self._keep_text = keep_text
        self._cipher = None if text_key is None else TextCipher(text_key)
        self._history_limit = history_limit
        self._guard = threading.Lock()
        self._locks: dict[str, threading.RLock] = {}
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._keys: OrderedDict[str, dict[str, list[BlockRecord]]] = OrderedDict()
        self._swept: set[str] = set()
        self._names: dict[str, str] = {}
        self._lock_file = self._open()

    # ------------------------------------------------------------ opening

    def _open(self) -> int:
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.root / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise failure(error, f"opening {self.root}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise StoreFailed(f"another server has the store {self.root} open") from error
        try:
            self._check_format()
            for name in ("tenants", "staging", "trash"):
                if not self.files.exists(self.root / name):
                    self.files.make_directory(self.root / name)
            self.files.sync_directory(self.root)
            for name in ("staging", "trash"):
                for left in self.files.list(self.root / name):
                    self._delete_tree(self.root / name / left)
            self._read_names()
        except OSError as error:
            os.close(descriptor)
            raise failure(error, f"opening {self.root}") from error
        except StoreFailed:
            os.close(descriptor)
            raise
        return descriptor

    def _check_format(self) -> None:
        path = self.root / "FORMAT"
        if not self.files.exists(path):
            replace_durably(self.files, path, STORE_FORMAT.encode() + b"\n")
        found = self.files.read(path).decode("utf-8", "replace").strip()
        if found != STORE_FORMAT:
            raise StoreFailed(f"the store {self.root} has the format {found!r}, this server knows {STORE_FORMAT!r}")

    def _read_names(self) -> None:
        for fan in self.files.list(self.root / "tenants"):
            for tenant_id in self.files.list(self.root / "tenants" / fan):
                try:
                    name = unseal(self.files.read(self.root / "tenants" / fan / tenant_id / "name"), str)
                except (Damaged, FileNotFoundError):
                    # whoever knows the tenant's name still reaches it; only the list lacks it
                    continue
                self._names[tenant_id] = name

    def close(self) -> None:
        if self._lock_file >= 0:
            os.close(self._lock_file)
            self._lock_file = -1

    # ------------------------------------------------------------ paths and locks

    @staticmethod
    def _id(tenant: str) -> str:
        return hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()

    def _directory(self, tenant: str) -> Path:
        tenant_id = self._id(tenant)
        return self.root / "tenants" / tenant_id[:2] / tenant_id

    def _lock(self, tenant: str) -> threading.RLock:
        with self._guard:
            return self._locks.setdefault(tenant, threading.RLock())

    # ------------------------------------------------------------ reading

    def tenants(self) -> Iterator[str]:
        with self._guard:
            names = sorted(self._names.values())
        return iter(names)

    def load(self, tenant: str) -> Manifest | None:
        with self._lock(tenant):
            manifest = self._manifests.get(tenant)
            if manifest is not None:
                with self._guard:
                    self._manifests.move_to_end(tenant)
                return manifest
            directory = self._directory(tenant)
            try:
                data = self.files.read(directory / "manifest")
            except FileNotFoundError:
                if self.files.exists(directory):
                    raise self._quarantined("its manifest is missing") from None
                return None
            except OSError as error:
                raise failure(error, "reading a manifest") from error
            try:
                manifest = unseal_manifest(data, tenant)
            except Damaged as error:
                raise self._quarantined(f"its manifest is damaged ({error})") from error
            self._remember(manifest)
            self._sweep(tenant, manifest)
            return manifest

    @staticmethod
    def _quarantined(reason: str) -> TenantQuarantined:
        return TenantQuarantined(f"this tenant is in quarantine: {reason}")

    def _remember(self, manifest: Manifest) -> None:
        with self._guard:
            self._manifests[manifest.tenant] = manifest
            self._manifests.move_to_end(manifest.tenant)
            while len(self._manifests) > _CACHED:
                self._manifests.popitem(last=False)

    def _forget(self, tenant: str) -> None:
        with self._guard:
            self._manifests.pop(tenant, None)
            self._keys.pop(tenant, None)

    def _sweep(self, tenant: str, manifest: Manifest) -> None:
        """Removes what an earlier process wrote and no manifest names. Once a tenant and start."""
        if tenant in self._swept:
            return
        self._swept.add(tenant)
        named = {"name", "manifest", *(ref.name for ref in _blobs(manifest))}
        directory = self._directory(tenant)
        with suppress(OSError):
            for name in self.files.list(directory):
                if name not in named:
                    self.files.remove(directory / name)

    def read(self, tenant: str, blob: BlobRef) -> bytes:
        try:
            data = self.files.read(self._directory(tenant) / blob.name)
        except FileNotFoundError as error:
            raise self._quarantined("a blob is missing") from error
        except OSError as error:
            raise failure(error, "reading a blob") from error
        if len(data) != blob.size or checksum(data) != blob.checksum:
            raise self._quarantined("a blob is damaged")
        return data

    def _require(self, tenant: str) -> Manifest:
        manifest = self.load(tenant)
        if manifest is None:
            raise TenantNotFound("there is no such tenant")
        return manifest

    # ------------------------------------------------------------ writing

    def create(self, manifest: Manifest) -> Manifest:
        tenant, directory = manifest.tenant, self._directory(manifest.tenant)
        staged = self.root / "staging" / secrets.token_hex(16)
        with self._lock(tenant):
            if self.files.exists(directory):
                raise TenantExists("this tenant exists already")
            try:
                if not self.files.exists(directory.parent):
                    with suppress(FileExistsError):
                        self.files.make_directory(directory.parent)
                    self.files.sync_directory(directory.parent.parent)
                self.files.make_directory(staged)
                self.files.write(staged / "name", seal(tenant))
                self.files.write(staged / "manifest", seal(manifest))
                self.files.sync_directory(staged)
                self.files.rename(staged, directory)
                self.files.sync_directory(directory.parent)
            except OSError as error:
                self._delete_tree(staged)
                raise failure(error, "creating a tenant") from error
            self._remember(manifest)
            with self._guard:
                self._names[self._id(tenant)] = tenant
                self._swept.add(tenant)
            return manifest

    def _put(self, tenant: str, version: int, kind: str, data: bytes) -> BlobRef:
        """Writes a blob that no manifest names yet. Raises OSError, having removed what it wrote."""
        directory = self._directory(tenant)
        name = f"{version:010d}-{secrets.token_hex(8)}.{kind}"
        try:
            self.files.write(directory / name, data)
            self.files.sync_directory(directory)
        except OSError:
            self._discard(tenant, [name])
            raise
        return BlobRef(name, len(data), checksum(data))

    def _discard(self, tenant: str, names: list[str]) -> None:
        for name in names:
            # what cannot be removed now is an orphan, swept at the next start
            with suppress(OSError):
                self.files.remove(self._directory(tenant) / name)

    def _swap(self, manifest: Manifest, fresh: list[BlobRef]) -> None:
        """Makes ``manifest`` the tenant's own. Raises StoreFull or StoreFailed, and never says which of the
        two manifests holds after a failure: the next reader finds out from the disk."""
        tenant = manifest.tenant
        try:
            replace_durably(self.files, self._directory(tenant) / "manifest", seal(manifest))
        except OSError as error:
            self._forget(tenant)
            with suppress(StoreFailed, StoreFull, TenantQuarantined):
                now = self.load(tenant)
                if now is not None and now != manifest:
                    self._discard(tenant, [ref.name for ref in fresh])
            self._forget(tenant)
            raise failure(error, "writing a manifest") from error
        self._remember(manifest)

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
        with self._lock(tenant):
            manifest = self._require(tenant)
            if manifest.version != expected_version:
                raise VersionConflict(
                    f"the memory is at version {manifest.version}, not {expected_version}", retry_after=0.1
                )
            version = expected_version + 1
            if not self._keep_text:
                text = None
            elif text is not None and self._cipher is not None:
                text = self._cipher.encrypt(text, tenant, version, secrets.token_bytes(12))
            try:
                ref = self._put(tenant, version, "block", blob)
            except OSError as error:
                raise failure(error, "writing a block") from error
            record = BlockRecord(version, ref, time, tokens, text, idempotency)
            manifest = msgspec.structs.replace(
                manifest, version=version, blocks=(*manifest.blocks, record)
            )
            self._swap(manifest, [ref])
            if idempotency is not None and tenant in self._keys:
                self._keys[tenant].setdefault(idempotency.key, []).append(_bare(record))
            return manifest

    def compact(self, tenant: str, version: int, snapshot: bytes) -> Manifest:
        with self._lock(tenant):
            old = self._require(tenant)
            gone = [block for block in old.blocks if block.version <= version]
            if not gone:
                return old
            fresh: list[BlobRef] = []
            try:
                fresh.append(self._put(tenant, version, "snapshot", snapshot))
                archive, replaced = self._archive(old, gone, version, fresh)
            except OSError as error:
                self._discard(tenant, [ref.name for ref in fresh])
                raise failure(error, "writing a snapshot") from error
            manifest = msgspec.structs.replace(
                old,
                snapshot=Snapshot(version, fresh[0]),
                blocks=tuple(block for block in old.blocks if block.version > version),
                archive=archive,
            )
            self._swap(manifest, fresh)
            with self._guard:
                self._keys.pop(tenant, None)
            left = [old.snapshot.blob.name] if old.snapshot is not None else []
            self._discard(tenant, [*left, *(b.blob.name for b in gone), *(ref.name for ref in replaced)])
            return manifest

    def _archive(
        self, old: Manifest, gone: list[BlockRecord], version: int, fresh: list[BlobRef]
    ) -> tuple[tuple[BlobRef, ...], list[BlobRef]]:
        """The next archive and the segments it replaces: one more segment, or all merged into one."""
        records, kept = gone, list(old.archive)
        if len(kept) >= _MOST_SEGMENTS:
            records, kept = [*self._archived(old), *gone], []
        records = records[-self._history_limit :]
        fresh.append(self._put(old.tenant, version, "archive", seal(records)))
        return (*kept, fresh[-1]), [] if kept or not old.archive else list(old.archive)

    def _archived(self, manifest: Manifest) -> list[BlockRecord]:
        records: list[BlockRecord] = []
        for ref in manifest.archive:
            try:
                records += unseal(self.read(manifest.tenant, ref), list[BlockRecord])
            except Damaged as error:
                raise self._quarantined("its archive is damaged") from error
        return records

    # ------------------------------------------------------------ history

    def _records(self, tenant: str) -> list[BlockRecord]:
        with self._lock(tenant):
            manifest = self._require(tenant)
            return [*self._archived(manifest), *manifest.blocks][-max(self._history_limit, len(manifest.blocks)) :]

    def history(self, tenant: str) -> list[BlockRecord]:
        records = self._records(tenant)
        if self._cipher is not None:
            return [self._cipher.decrypt(record, tenant) for record in records]
        return [r if r.text is None or not r.text.startswith("aes256gcm:") else _bare(r) for r in records]

    def find(self, tenant: str, key: str) -> list[BlockRecord]:
        with self._lock(tenant):
            if tenant not in self._keys:
                keys: dict[str, list[BlockRecord]] = {}
                for record in self._records(tenant):
                    if record.idempotency is not None:
                        keys.setdefault(record.idempotency.key, []).append(_bare(record))
                with self._guard:
                    self._keys[tenant] = keys
                    while len(self._keys) > _CACHED:
                        self._keys.popitem(last=False)
            return list(self._keys[tenant].get(key, ()))

    def usage(self, tenant: str) -> int:
        manifest = self._require(tenant)
        return len(seal(manifest)) + sum(ref.size for ref in _blobs(manifest))

    # ------------------------------------------------------------ erasing

    def erase(self, tenant: str) -> Receipt | None:
        with self._lock(tenant):
            directory = self._directory(tenant)
            if not self.files.exists(directory):
                return None
            version, size = 0, 0
            with suppress(TenantQuarantined, StoreFailed):
                manifest = self._require(tenant)
                version, size = manifest.version, self.usage(tenant)
            gone = self.root / "trash" / secrets.token_hex(16)
            try:
                blobs = len(set(self.files.list(directory)) - {"name", "manifest"})
                self.files.rename(directory, gone)
                self.files.sync_directory(directory.parent)
                self.files.sync_directory(gone.parent)
            except OSError as error:
                raise failure(error, "erasing a tenant") from error
            finally:
                self._forget(tenant)
            with self._guard:
                self._names.pop(self._id(tenant), None)
                self._swept.discard(tenant)
            self._delete_tree(gone)
            return Receipt(tenant, version, blobs, size)

    def _delete_tree(self, directory: Path) -> None:
        with suppress(OSError):
            for name in self.files.list(directory):
                self.files.remove(directory / name)
            self.files.remove_directory(directory)


def _blobs(manifest: Manifest) -> list[BlobRef]:
    snapshot = [] if manifest.snapshot is None else [manifest.snapshot.blob]
    return [*snapshot, *(block.blob for block in manifest.blocks), *manifest.archive]


def _bare(record: BlockRecord) -> BlockRecord:
    return msgspec.structs.replace(record, text=None)
