"""The one file per tenant that says what is true, and what becomes of it when writing it fails.

All methods but ``cached`` are called under the tenant's lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress

from app.errors import StoreFailed
from app.store.base import BlobRef, Manifest
from app.store.blobs import Blobs
from app.store.files import FileSystem, failure, replace_durably, translated
from app.store.home import Home
from app.store.lineages import dropped
from app.store.parts import quarantined
from app.store.records import Damaged, seal, unseal_manifest

_CACHED = 512


class Manifests:
    """Reads, caches and replaces manifests."""

    def __init__(self, home: Home, files: FileSystem, blobs: Blobs) -> None:
        self._home = home
        self._files = files
        self._blobs = blobs
        self._guard = threading.Lock()
        self._cache: OrderedDict[str, Manifest] = OrderedDict()
        self._swept: set[str] = set()
        self._unsure: set[str] = set()

    # ------------------------------------------------------------ reading

    def cached(self, tenant: str) -> Manifest | None:
        with self._guard:
            manifest = self._cache.get(tenant)
            if manifest is not None:
                self._cache.move_to_end(tenant)
            return manifest

    def load(self, tenant: str) -> Manifest | None:
        """Raises TenantQuarantined, StoreFailed."""
        manifest = self.cached(tenant)
        if manifest is not None:
            return manifest
        if tenant in self._unsure:
            self._settle(tenant)
        directory = self._home.directory(tenant)
        with translated("reading a manifest"):
            try:
                data = self._files.read(directory / "manifest")
            except FileNotFoundError:
                if self._files.exists(directory):
                    raise quarantined("its manifest is missing") from None
                return None
        try:
            manifest = unseal_manifest(data, tenant)
        except Damaged as error:
            raise quarantined(f"its manifest is damaged ({error})") from error
        # once per tenant and start, and again after a failure
        if tenant not in self._swept:
            self._blobs.sweep(manifest)
            with self._guard:
                self._swept.add(tenant)
        self.remember(manifest)
        return manifest

    def remember(self, manifest: Manifest) -> None:
        with self._guard:
            self._cache[manifest.tenant] = manifest
            self._cache.move_to_end(manifest.tenant)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)

    def forget(self, tenant: str) -> None:
        """The tenant is gone, or its manifest must be read from the disk again."""
        with self._guard:
            self._cache.pop(tenant, None)
            self._swept.discard(tenant)

    # ------------------------------------------------------------ writing

    def swap(self, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        """Replaces ``old`` durably by ``new``, which names the blobs ``fresh`` besides, and returns it.

        Then the blobs are removed that only ``old`` named. Raises StoreFull or StoreFailed if ``old`` still
        holds (``fresh`` are removed then), StoreFailed if nobody can tell; that is settled before the tenant
        is next read.
        """
        path = self._home.directory(new.tenant) / "manifest"
        try:
            replace_durably(self._files, path, seal(new))
        except OSError as error:
            with suppress(OSError, Damaged):
                if unseal_manifest(self._files.read(path), old.tenant) == old:
                    self._blobs.discard(old.tenant, [ref.name for ref in fresh])
                    raise failure(error, "writing a manifest") from error
            self.doubt(new.tenant)
            raise StoreFailed("the store failed while writing a manifest: nothing is acknowledged") from error
        self.remember(new)
        self._blobs.discard(new.tenant, dropped(old, new))
        return new

    def doubt(self, tenant: str) -> None:
        """A directory's sync failed after a rename: what is seen now might not outlive a crash."""
        self.forget(tenant)
        with self._guard:
            self._unsure.add(tenant)

    def _settle(self, tenant: str) -> None:
        """Makes what the disk shows now durable, by writing it once more: a sync that failed proves nothing
        when it is repeated. Raises StoreFailed, and the tenant stays in doubt."""
        directory = self._home.directory(tenant)
        try:
            data = b""
            with suppress(FileNotFoundError):
                data = self._files.read(directory / "manifest")
            # a damaged one is left as it is, for the reader to find
            with suppress(Damaged):
                unseal_manifest(data, tenant)
                replace_durably(self._files, directory / "manifest", data)
            if self._files.exists(directory.parent):
                self._files.sync_directory(directory.parent)
            self._files.sync_directory(self._home.tenants)
        except OSError as error:
            raise StoreFailed("the store cannot tell whether this tenant's last change is durable") from error
        with self._guard:
            self._unsure.discard(tenant)
