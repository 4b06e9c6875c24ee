"""Durable file primitives. Everything the disk store does to a disk goes through ``FileSystem``.

The real one is ``Disk``; tests put a fake in its place that forgets what was not synced, or fails. A failed
fsync is never retried on the same file: the file is abandoned.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from app.errors import FULL_SECONDS, StoreFailed, StoreFull

# bytes read at a time: what stays in a processor's cache
_PART = 1 << 18
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class File(Protocol):
    """A file being written. Each call raises OSError as the system does."""

    def write(self, data: memoryview) -> int:
        """Appends the start of ``data``; returns how many bytes of it."""
        ...

    def write_at(self, data: memoryview, offset: int) -> int:
        """Writes the start of ``data`` over what is at ``offset``; returns how many bytes of it."""
        ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Source(Protocol):
    """A file being read. Raises OSError as the system does."""

    def read_at(self, buffer: memoryview, offset: int) -> int:
        """Fills the start of ``buffer`` with what is at ``offset``; returns how many bytes of it, 0 at the end."""
        ...

    def close(self) -> None: ...


class FileSystem(Protocol):
    """The calls the store needs; each raises OSError as the system does."""

    def create(self, path: Path) -> File:
        """Opens ``path``, which must not exist, for writing."""
        ...

    def fill(self, path: Path) -> File:
        """Opens the file ``path``, which is there and empty, for writing."""
        ...

    def edit(self, path: Path) -> File:
        """Opens the file ``path`` for writing over what it holds; its size stays."""
        ...

    def rename(self, source: Path, target: Path) -> None: ...

    def link(self, source: Path, target: Path) -> None:
        """Gives the file ``source`` a second name ``target``, which must not exist."""
        ...

    def sync_directory(self, path: Path) -> None: ...

    def make_directory(self, path: Path) -> None: ...

    def read(self, path: Path) -> bytes: ...

    def read_into(self, path: Path, buffer: memoryview, seen: Callable[[memoryview], None]) -> int:
        """Reads the start of the file, as far as ``buffer`` reaches; ``seen`` is called with each part as it comes,
        while it is in the processor's cache. Returns how many bytes were read."""
        ...

    def expect(self, path: Path, size: int) -> None:
        """The first ``size`` bytes of the file are read soon; waits for none of them."""
        ...

    def source(self, path: Path) -> Source:
        """Opens ``path`` for reading; what it holds stays readable when its name is taken away."""
        ...

    def size(self, path: Path) -> int: ...

    def remove(self, path: Path) -> None: ...

    def remove_directory(self, path: Path) -> None: ...

    def list(self, path: Path) -> list[str]: ...

    def exists(self, path: Path) -> bool: ...


class _DiskFile:
    def __init__(self, path: Path, flags: int) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)

    def write(self, data: memoryview) -> int:
        return os.write(self._descriptor, data)

    def write_at(self, data: memoryview, offset: int) -> int:
        return os.pwrite(self._descriptor, data, offset)

    def sync(self) -> None:
        # times are of no matter; a size that has changed is synced all the same
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class _DiskSource:
    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_at(self, buffer: memoryview, offset: int) -> int:
        return os.preadv(self._descriptor, [buffer], offset)

    def close(self) -> None:
        os.close(self._descriptor)


class Disk:
    """The operating system's files."""

    def create(self, path: Path) -> File:
        return _DiskFile(path, os.O_CREAT | os.O_EXCL)

    def fill(self, path: Path) -> File:
        return _DiskFile(path, os.O_NOFOLLOW)

    def edit(self, path: Path) -> File:
        return _DiskFile(path, os.O_NOFOLLOW)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

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

    def read_into(self, path: Path, buffer: memoryview, seen: Callable[[memoryview], None]) -> int:
        done = 0
        with open(path, "rb", buffering=0) as file:
            while done < len(buffer):
                count = file.readinto(buffer[done : done + _PART])
                if not count:
                    break
                seen(buffer[done : done + count])
                done += count
        return done

    def expect(self, path: Path, size: int) -> None:
        # not every system has it
        if hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def source(self, path: Path) -> Source:
        return _DiskSource(path)

    def size(self, path: Path) -> int:
        return path.stat().st_size

    def remove(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    def list(self, path: Path) -> list[str]:
        return os.listdir(path)

    def exists(self, path: Path) -> bool:
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def failure(error: OSError, doing: str) -> StoreFull | StoreFailed:
    """The service's error for the system's: no room left, or anything else."""
    if error.errno in _FULL:
        return StoreFull("no room is left in the store; nothing was changed", retry_after=FULL_SECONDS)
    return StoreFailed(f"the store failed while {doing}: {error.strerror or type(error).__name__}")


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raises StoreFull or StoreFailed in place of the system's OSError."""
    try:
        yield
    except OSError as error:
        raise failure(error, doing) from error


def write_synced(files: FileSystem, path: Path, data: bytes | memoryview) -> None:
    """Creates ``path`` with ``data`` and syncs it; the caller syncs its directory. Raises OSError."""
    _write_and_sync(files.create(path), data)


def fill_synced(files: FileSystem, path: Path, data: bytes | memoryview) -> None:
    """As ``write_synced``, of a file that is there and empty."""
    _write_and_sync(files.fill(path), data)


def _write_and_sync(file: File, data: bytes | memoryview) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
        file.sync()
    finally:
        file.close()


def write_over(files: FileSystem, path: Path, data: bytes, offsets: Sequence[int]) -> None:
    """Writes ``data`` at each of ``offsets`` of a file and syncs it. Raises OSError; what it holds is unknown then."""
    file = files.edit(path)
    try:
        for offset in offsets:
            view = memoryview(data)
            while view:
                written = file.write_at(view, offset)
                view, offset = view[written:], offset + written
        file.sync()
    finally:
        file.close()


def sync_file(files: FileSystem, path: Path) -> None:
    """Makes what a file holds durable, whoever wrote it. Raises OSError."""
    write_over(files, path, b"", [])


def remove_quietly(files: FileSystem, path: Path) -> None:
    """For what is in nobody's way if it stays: it is swept at the next start."""
    try:
        files.remove(path)
    except OSError:
        return


def replace_durably(files: FileSystem, path: Path, data: bytes) -> None:
    """Makes ``path`` hold ``data``, all or nothing, durable on return. Raises OSError.

    Temporary file, fsync, rename, fsync of the directory. After an error the old content may still be there,
    and then nothing has changed; or the new one, and then nobody knows yet whether it would outlive a crash.
    """
    temporary = path.with_name(path.name + ".tmp")
    if files.exists(temporary):
        files.remove(temporary)
    try:
        write_synced(files, temporary, data)
        files.rename(temporary, path)
    except OSError:
        remove_quietly(files, temporary)
        raise
    files.sync_directory(path.parent)


def is_there(files: FileSystem, path: Path) -> bool:
    """Whether ``path`` exists, or might: for finding out what a failed call has done."""
    try:
        return files.exists(path)
    except OSError:
        return True


def remove_tree(files: FileSystem, directory: Path) -> None:
    """Removes a directory of files. Raises OSError."""
    for name in files.list(directory):
        files.remove(directory / name)
    files.remove_directory(directory)
