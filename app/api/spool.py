"""Files in which memories cross between HTTP and the worker: too large for a message, and gone when they are done.

Each lies in a directory that only this user can enter and has its name no longer than it must. What a killed
server has left behind, the next one on this machine removes.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from app.api.bounds import Bound, Clock
from app.errors import FULL_SECONDS, ServerBusy, StoreFull, TenantBusy, TenantErased

log = structlog.get_logger("api")

_PREFIX = "memoryllm-spool-"
_LOCK = "lock"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHUNK = 1 << 20


class SpoolFile:
    """One transfer's file, open for reading and writing, of mode 0600."""

    def __init__(self, path: Path, tenant: str) -> None:
        self.path, self.tenant = path, tenant
        self._revoked = False
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115

    def write(self, data: bytes | bytearray) -> None:
        """Appends ``data``. Raises StoreFull, TenantErased."""
        rest = memoryview(data)
        try:
            while rest:
                self.check()
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise StoreFull(
                    "there is no room for the file in the server's spool directory", retry_after=FULL_SECONDS
                ) from error
            raise

    def read(self) -> bytes:
        """The next piece; nothing at the end. Raises TenantErased."""
        data = self._file.read(CHUNK) or b""
        self.check()
        return data

    def check(self) -> None:
        """Raises TenantErased if it was revoked."""
        if self._revoked:
            raise TenantErased("the tenant was erased")

    def revoke(self) -> None:
        """Its tenant is erased: nothing of it is read or kept any longer."""
        self._revoked = True
        self.unlink()
        with suppress(OSError):
            self._file.truncate(0)

    def unlink(self) -> None:
        """Takes the name away; what is open can still be read."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.unlink()
        self._file.close()


class Spool:
    """The transfers of one server, at most ``most`` at once, below ``root`` (None: the system's own place).

    One tenant, or one key, has half of them, so that whoever takes his time leaves the others theirs.
    ``working`` bounds those that the worker has in hand: an import takes a pool or two of its host memory.
    """

    def __init__(self, root: Path | None, most: int, clock: Clock = time.monotonic) -> None:
        self.root = root or Path(tempfile.gettempdir())
        self.working = asyncio.Semaphore(2)
        self._places = Bound(most, clock)
        self._share = max(1, most // 2)
        self._held: Counter[tuple[str, str]] = Counter()
        self._directory: Path | None = None
        self._lock = -1
        self._open: set[SpoolFile] = set()

    @contextmanager
    def file(self, tenant: str, key: str | None = None) -> Iterator[SpoolFile]:
        """A new empty file, gone when the context is left. ``key``: the id of the one it is asked for with.

        Raises ServerBusy, TenantBusy, OSError.
        """
        owners = [("tenant", tenant)] if key is None else [("tenant", tenant), ("key", key)]
        for owner in owners:
            if self._held[owner] >= self._share:
                # until any has ended: whose that will be nobody knows
                wait = self._places.wait(most=self._places.used)
                raise TenantBusy(
                    f"this {owner[0]} has too many exports and imports under way", retry_after=wait
                )
        if not self._places.fits(1):
            wait = self._places.wait()
            raise ServerBusy("too many memories are being exported or imported", retry_after=wait)
        try:
            file = SpoolFile(self._own() / uuid.uuid4().hex, tenant)
        except FileNotFoundError:
            # what cleans up temporary directories has taken ours
            self._disown()
            file = SpoolFile(self._own() / uuid.uuid4().hex, tenant)
        self._open.add(file)
        self._places.take(1)
        self._held.update(owners)
        try:
            yield file
        finally:
            self._open.discard(file)
            self._places.give(1)
            self._held.subtract(owners)
            for owner in owners:
                if not self._held[owner]:
                    del self._held[owner]
            file.close()

    def revoke(self, tenant: str) -> int:
        """Cuts off the transfers of an erased tenant; how many there were."""
        mine = [file for file in self._open if file.tenant == tenant]
        for file in mine:
            file.revoke()
        return len(mine)

    # ------------------------------------------------------------ the directory

    def _own(self) -> Path:
        if self._directory is None:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.root))
            # the lock gets its name only when it is held: a directory without one may be just being made
            coming = directory / "coming"
            self._lock = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            coming.rename(directory / _LOCK)
            self._directory = directory
        return self._directory

    def sweep(self) -> int:
        """Removes what servers that were killed have left behind; how many directories. Raises nothing."""
        removed = 0
        with suppress(OSError):
            for directory in self.root.glob(f"{_PREFIX}*"):
                with suppress(OSError):
                    removed += _remove_left(directory)
        if removed:
            log.info("leftovers of transfers removed", directories=removed)
        return removed

    def close(self) -> None:
        for file in list(self._open):
            file.unlink()
        self._disown()

    def _disown(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._lock)
            self._directory = None


def _remove_left(directory: Path) -> bool:
    """Removes ``directory`` if it is ours and its server is gone. Raises OSError."""
    found = directory.lstat()
    if found.st_uid != os.geteuid() or not directory.is_dir() or directory.is_symlink():
        return False
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(directory)
    finally:
        os.close(lock)
    return True
