"""The store on a disk: a directory per tenant, in it immutable blobs and one manifest.

A commit writes and syncs the block, in a file that was made ahead under a name never used before or again, then
appends to the manifest's journal. Every other change writes and syncs its blobs and their directory, replaces the
manifest, and deletes afterwards what the new one no longer names; a new tenant is made in ``staging``. The layout is in
``home``, what becomes of a manifest in ``lineages`` and, when writing it fails, in ``manifests``; older records are in
``histories``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.errors import ServiceError, StoreFailed, TenantQuarantined
from app.store.base import BlobRef, Manifest, Receipt
from app.store.blobs import Blobs
from app.store.files import Disk, FileSystem, translated
from app.store.home import Home, tenant_id
from app.store.lineages import Copy
from app.store.locks import TenantLocks
from app.store.manifests import Manifests
from app.store.names import Names, chosen
from app.store.operations import Operations
from app.store.parts import Place
from app.store.staging import Staging
from app.store.texts import Texts
from app.store.trash import Trash


@dataclass(frozen=True)
class _Staged:
    """A directory in which a tenant is made; its maker syncs it."""

    blobs: Blobs
    directory: Path

    def put(self, name: str, data: bytes) -> BlobRef:
        return self.blobs.write(self.directory, name, data)

    def share(self, tenant: str, copy: Copy) -> None:
        self.blobs.share(tenant, copy, self.directory)


class DiskStore(Operations):
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
        texts = Texts(keep_text, text_key)
        self._home = Home(root, self.files, texts, patience)
        blobs = Blobs(self._home, self.files)
        self._disk_manifests = Manifests(self._home, self.files, blobs)
        super().__init__(blobs, self._disk_manifests, texts, TenantLocks(), history_limit)
        self._staging = Staging(self._home, self.files, self._disk_manifests)
        self._disk_blobs = blobs
        self._trash = Trash(self._home, self.files)
        try:
            self._names = Names(self._home)
        except BaseException:
            self._home.close()
            raise

    def close(self) -> None:
        """Waits for what is under way, refuses whatever comes later, and lets another server open the store."""
        self._locks.close()
        self._names.close()
        self._home.close()

    # ------------------------------------------------------------ claims: one process owns every tenant

    def claim(self, tenant: str) -> Manifest | None:
        return self.load(tenant)

    def claimed(self, tenant: str) -> bytes | None:
        return b"the disk's owner"

    def holds(self, tenant: str) -> bool:
        return True

    def release(self, tenant: str) -> None: ...

    # ------------------------------------------------------------ reading

    def tenants(self, only: Sequence[str] | None = None) -> Iterator[str]:
        names = self._names.all()
        return iter(names if only is None else chosen(names, only))

    def _load(self, tenant: str) -> Manifest | None:
        manifest = self._disk_manifests.load(tenant)
        if manifest is None:
            self._names.drop(tenant_id(tenant))
        else:
            self._names.add(tenant_id(tenant), tenant)
        return manifest

    def _make(self, tenant: str, fill: Callable[[Place], Manifest]) -> Manifest:
        manifest = self._staging.make(tenant, lambda staged: fill(_Staged(self._disk_blobs, staged)))
        self._names.add(tenant_id(tenant), tenant)
        return manifest

    def waiting(self, tenant: str) -> set[str]:
        """Names of empty files that are there for the tenant's next blocks, and count for nothing yet."""
        return self._disk_blobs.waiting(tenant)

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
                self._disk_manifests.forget(tenant)
                try:
                    self._trash.put(tenant, manifest)
                    receipt = self._trash.empty(tenant)
                except ServiceError:
                    if self._trash.holds(tenant):
                        self._disk_manifests.doubt(tenant)
                    raise
            self._names.drop(tenant_id(tenant))
            return receipt
