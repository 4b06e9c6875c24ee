"""Durable file primitives. Everything the disk store does to a disk goes through ``FileSystem``.

The real one syncs what it says it has written; tests put a fake in its place that forgets what was not
synced, or fails. A failed fsync is never retried on the same file: the file is abandoned.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Protocol

from app.errors import StoreFailed, StoreFull

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileSystem(Protocol):
    """The calls the store needs; each raises OSError as the system does."""

    def write(self, path: Path, data: bytes) -> None:
        """Creates ``path``, which must not exist, with ``data``, and syncs the file (not its directory)."""
        ...

    def rename(self, source: Path, target: Path) -> None: ...

    def sync_directory(self, path: Path) -> None: ...

    def make_directory(self, path: Path) -> None: ...

    def read(self, path: Path) -> bytes: ...

    def remove(self, path: Path) -> None: ...

    def remove_directory(self, path: Path) -> None: ...

    def list(self, path: Path) -> list[str]: ...

    def exists(self, path: Path) -> bool: ...


class Disk:
    """The operating system's files."""

    def write(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def make_directory(self, path: Path) -> None:
        os.mkdir(path, 0o700)

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    def list(self, path: Path) -> list[str]:
        return os.listdir(path)

    def exists(self, path: Path) -> bool:
        return path.exists()


def failure(error: OSError, doing: str) -> StoreFull | StoreFailed:
    """The service's error for the system's: no room left, or anything else."""
    if error.errno in _FULL:
        return StoreFull("no room is left in the store; nothing was changed", retry_after=30.0)
    return StoreFailed(f"the store failed while {doing}: {os.strerror(error.errno or 0)}")


def replace_durably(files: FileSystem, path: Path, data: bytes) -> None:
    """Makes ``path`` hold ``data``, all or nothing, durable on return. Raises OSError.

    Temporary file, fsync, rename, fsync of the directory. On an error before the rename nothing has changed;
    after it the outcome is unknown until the directory is read again.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if files.exists(temporary):
            files.remove(temporary)
        files.write(temporary, data)
        files.rename(temporary, path)
    except OSError:
        if files.exists(temporary):
            files.remove(temporary)
        raise
    files.sync_directory(path.parent)
