"""Making a tenant: whole and durable in a directory that nobody looks at, then renamed into its place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from app.errors import ServiceError, StoreFailed, TenantExists
from app.store.base import Manifest
from app.store.files import FileSystem, is_there, remove_tree, translated, write_synced
from app.store.home import Home
from app.store.journal import Head
from app.store.manifests import Manifests
from app.store.records import seal


class Staging:
    """Called under the new tenant's lock. What a crash leaves here is deleted when the store is opened."""

    def __init__(self, home: Home, files: FileSystem, manifests: Manifests) -> None:
        self._home = home
        self._files = files
        self._manifests = manifests

    def make(self, tenant: str, fill: Callable[[Path], Manifest]) -> Manifest:
        """Makes the tenant of the blobs that ``fill`` writes, synced, into the directory it is given, and of the
        manifest that it returns.

        Raises TenantExists, StoreFull, StoreFailed, and the service's errors that ``fill`` raises.
        """
        directory, staged = self._home.directory(tenant), self._home.new_staging()
        with translated("creating a tenant"):
            if self._files.exists(directory):
                raise TenantExists("this tenant exists already")
            try:
                if not self._files.exists(directory.parent):
                    with suppress(FileExistsError):
                        self._files.make_directory(directory.parent)
                # always: another thread may have made it and not synced it yet
                self._files.sync_directory(self._home.tenants)
                self._files.make_directory(staged)
                manifest = fill(staged)
                write_synced(self._files, staged / "name", seal(tenant))
                write_synced(self._files, staged / "manifest", seal(Head(manifest)))
                self._files.sync_directory(staged)
                self._files.rename(staged, directory)
                self._files.sync_directory(directory.parent)
            except (OSError, ServiceError) as error:
                with suppress(OSError):
                    remove_tree(self._files, staged)
                if is_there(self._files, directory):
                    self._manifests.doubt(tenant)
                    raise StoreFailed("the store failed while creating a tenant") from error
                raise
        self._manifests.remember(manifest)
        return manifest
