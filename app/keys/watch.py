"""The keys as they are now: the file is read again when it has changed, without a restart."""

from __future__ import annotations

import time
from pathlib import Path

import structlog

from app.keys.file import BadKeysFile, read
from app.keys.ring import Ring

log = structlog.get_logger("api")

_LOOK_EVERY = 1.0

Mark = tuple[int, int, int, int]


class WatchedRing:
    """Raises BadKeysFile at the start; of a file that is bad later on, that is reported and the last good one stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mark = self._look()
        self._ring = read(path)
        self._looked = time.monotonic()
        self._wrong: str | None = None

    def _look(self) -> Mark | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        # the change time too: whether the file is open to others is no part of its content
        return found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino

    @property
    def ring(self) -> Ring:
        """The newest good keys; a change is seen within a second."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            mark = self._look()
            # a bad one is tried again: what failed may have been the reading, and a revoked key must not live on that
            if mark != self._mark or self._wrong is not None:
                self._read(mark)
        return self._ring

    def _read(self, mark: Mark | None) -> None:
        try:
            self._ring = read(self._path)
            self._wrong = None
            log.info("keys read", keys=len(self._ring.keys))
        except BadKeysFile as error:
            if (mark, str(error)) != (self._mark, self._wrong):
                log.error("the keys file cannot be used, the last good keys stay", reason=str(error))
            self._wrong = str(error)
        self._mark = mark
