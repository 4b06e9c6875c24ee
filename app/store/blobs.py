"""A tenant's blobs: immutable files beside its manifest, under names that are never given twice."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from app.errors import ServiceError
from app.store.ahead import Ahead
from app.store.base import BlobRef, Manifest
from app.store.files import FileSystem, Source, failure, fill_synced, remove_quietly, write_synced
from app.store.home import Home
from app.store.lineages import Copy, blobs_of
from app.store.parts import new_name, quarantined, require_name
from app.store.records import BlobSum, blob_checksum

# bytes that a disk is asked for before anybody reads them: some more than it brings while the first are read
_FETCHED = 32 << 20

# a file system without hard links, or one that gives a file no more of them
_NO_LINKS = {
    errno.EPERM,
    errno.EACCES,
    errno.EXDEV,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}


class Blobs:
    """Writes, reads and removes blobs; which of them count is for the manifest to say."""

    def __init__(self, home: Home, files: FileSystem) -> None:
        self._home = home
        self._files = files
        self._guard = threading.Lock()
        self._coming: set[str] = set()
        self._ahead = Ahead(files, self.new_name)

    @staticmethod
    def new_name(version: int, kind: str) -> str:
        return new_name(version, kind)

    def put(self, tenant: str, name: str, data: bytes) -> BlobRef:
        """Writes a blob that no manifest names yet. Raises OSError, having removed what it wrote.

        Until a manifest names it nobody looks at the file, so it is written in place.
        """
        directory = self._home.directory(tenant)
        try:
            blob = self.write(directory, name, data)
            self._files.sync_directory(directory)
        except OSError:
            self.discard(tenant, [name])
            raise
        return blob

    def put_block(self, tenant: str, version: int, data: bytes) -> BlobRef:
        """As ``put``, of a block and under a name of its choice: into a file that was made ahead. Raises OSError."""
        directory = self._home.directory(tenant)
        name = self._ahead.take(tenant, directory, version)
        try:
            fill_synced(self._files, directory / name, data)
        except OSError:
            self.discard(tenant, [name])
            raise
        return BlobRef(name, len(data), blob_checksum(data))

    def write(self, directory: Path, name: str, data: bytes | memoryview) -> BlobRef:
        """Writes a blob; the caller syncs ``directory``. Raises OSError."""
        write_synced(self._files, directory / name, data)
        return BlobRef(name, len(data), blob_checksum(data))

    def share(self, tenant: str, copy: Copy, directory: Path) -> None:
        """Gives ``tenant``'s blob its second name, in ``directory``, which the caller syncs.

        A hard link, or a copy where there are none. Raises TenantQuarantined, StoreFailed, OSError.
        """
        theirs, ours = copy
        try:
            self._files.link(self._path(tenant, theirs), directory / ours.name)
        except FileNotFoundError as error:
            raise quarantined("a blob is missing", theirs.name) from error
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            try:
                data = self.read(tenant, theirs)
            except FileNotFoundError as absent:
                raise quarantined("a blob is missing", theirs.name) from absent
            self.write(directory, ours.name, data)
        if self._files.size(directory / ours.name) != ours.size:
            raise quarantined("a blob is damaged", theirs.name)

    def _path(self, tenant: str, blob: BlobRef) -> Path:
        require_name(blob)
        return self._home.directory(tenant) / blob.name

    def read(self, tenant: str, blob: BlobRef) -> memoryview:
        """Raises FileNotFoundError, TenantQuarantined, StoreFailed."""
        path = self._path(tenant, blob)
        found = BlobSum(blob.checksum)
        try:
            size = self._files.size(path)
            if size != blob.size:
                raise quarantined("a blob is damaged", blob.name)
            # memory that is not cleared first, since all of it is written
            data = np.empty(size, np.uint8).data
            count = self._files.read_into(path, data, found.update)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise failure(error, "reading a blob") from error
        if count != blob.size or found.text() != blob.checksum:
            raise quarantined("a blob is damaged", blob.name)
        return data

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None:
        """See ``app.store.base.Store.expect``."""
        left = _FETCHED
        with suppress(OSError, ServiceError):
            for blob in blobs:
                if left <= 0:
                    return
                self._files.expect(self._path(tenant, blob), min(left, blob.size))
                left -= blob.size

    def reader(self, tenant: str, blob: BlobRef) -> Source:
        """Raises FileNotFoundError, TenantQuarantined, StoreFailed."""
        try:
            return self._files.source(self._path(tenant, blob))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise failure(error, "reading a blob") from error

    def discard(self, tenant: str, names: list[str]) -> None:
        """Removes files that no manifest names; those that cannot be removed now are swept later."""
        for name in names:
            remove_quietly(self._files, self._home.directory(tenant) / name)

    def forget(self, tenant: str) -> None:
        """The tenant is gone, or is swept before it is next written to."""
        self._ahead.forget(tenant)

    def waiting(self, tenant: str) -> set[str]:
        """Names of the tenant's empty files that were made ahead."""
        return self._ahead.names(tenant)

    @contextmanager
    def coming(self, name: str) -> Iterator[None]:
        """Meanwhile the blob ``name`` is no orphan, though it is written outside the tenant's lock."""
        with self._guard:
            self._coming.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._coming.discard(name)

    def sweep(self, manifest: Manifest, journal: str | None) -> None:
        """Removes every file of the tenant's but its name, manifest, journal and the blobs that they name."""
        self._ahead.forget(manifest.tenant)
        with self._guard:
            named = {"name", "manifest", *self._coming, *(ref.name for ref in blobs_of(manifest))}
        if journal is not None:
            named.add(journal)
        with suppress(OSError):
            found = self._files.list(self._home.directory(manifest.tenant))
            self.discard(manifest.tenant, [name for name in found if name not in named])
