"""Erasing a tenant: its directory is renamed away durably, then deleted.

Called under the tenant's lock. What a crash leaves in the trash is deleted when the store is opened.
"""

from __future__ import annotations

from pathlib import Path

from app.errors import StoreFailed
from app.store.base import Manifest, Receipt
from app.store.files import FileSystem, is_there, remove_tree, translated
from app.store.home import Home
from app.store.parts import BLOB_NAME


class Trash:
    """An erasure that failed midway is remembered, and the next call for the tenant goes on with it."""

    def __init__(self, home: Home, files: FileSystem) -> None:
        self._home = home
        self._files = files
        self._unfinished: dict[str, tuple[Path, Receipt]] = {}

    def put(self, tenant: str, manifest: Manifest | None) -> None:
        """Takes the tenant's directory out of reach. ``manifest`` is None if it cannot be read.

        Raises StoreFull or StoreFailed: the tenant may still be there.
        """
        directory, gone = self._home.directory(tenant), self._home.new_trash()
        with translated("erasing a tenant"):
            names = self._files.list(directory)
            sizes = {name: self._files.size(directory / name) for name in names}
            # those without a byte were made ahead, and hold nothing yet
            versions = [
                int(match[1]) for match in map(BLOB_NAME.fullmatch, filter(sizes.get, sizes)) if match
            ]
            version = manifest.version if manifest is not None else max(versions, default=0)
            try:
                self._files.rename(directory, gone)
            finally:
                if is_there(self._files, gone):
                    self._unfinished[tenant] = (
                        gone,
                        Receipt(tenant, version, len(versions), sum(sizes.values())),
                    )

    def holds(self, tenant: str) -> bool:
        """Whether an erasure of the tenant has begun and not ended."""
        return tenant in self._unfinished

    def empty(self, tenant: str) -> Receipt | None:
        """Makes the erasure durable, then deletes; None if nothing is left to do. Raises StoreFailed."""
        if tenant not in self._unfinished:
            return None
        gone, receipt = self._unfinished[tenant]
        try:
            self._files.sync_directory(self._home.directory(tenant).parent)
            self._files.sync_directory(self._home.trash)
            if self._files.exists(gone):
                remove_tree(self._files, gone)
            self._files.sync_directory(self._home.trash)
        except OSError as error:
            raise StoreFailed(
                "the tenant is out of reach, but not all of it is deleted yet: erase it once more"
            ) from error
        del self._unfinished[tenant]
        return receipt
