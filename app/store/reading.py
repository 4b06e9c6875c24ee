"""Reading a blob piece by piece, in memory of a piece's size: it is known to be sound when the last has come."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import numpy as np

from app.errors import TenantQuarantined
from app.store.base import BlobRef
from app.store.files import Source, failure
from app.store.parts import quarantined
from app.store.records import BlobSum

# bytes asked for at a time: what stays in a processor's cache until it is summed
_PART = 1 << 18
_POURED = 1 << 20


class BlobReader:
    """``take`` gives the blob from its beginning, ``finish`` says whether that was what was written.

    ``gone`` raises what a blob that is missing means. All methods but ``close`` raise TenantQuarantined (torn or
    altered), StoreFailed, and what ``gone`` does.
    """

    def __init__(self, blob: BlobRef, source: Source, gone: Callable[[OSError], NoReturn]) -> None:
        self.size = blob.size
        self._blob, self._source, self._gone = blob, source, gone
        self._sum = BlobSum(blob.checksum)
        self._at = 0

    def __enter__(self) -> BlobReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._source.close()

    def damaged(self) -> TenantQuarantined:
        """What to raise if the blob is not what was written."""
        return quarantined("a blob is damaged", self._blob.name)

    def peek(self, offset: int, size: int) -> memoryview:
        """``size`` bytes at ``offset``, wherever ``take`` is. Nobody has checked them: see that they come again."""
        return self._filled(offset, size, lambda _: None)

    def take(self, size: int) -> memoryview:
        """The next ``size`` bytes, in memory that is the caller's. They are to be believed after ``finish``."""
        data = self._filled(self._at, size, self._sum.update)
        self._at += size
        return data

    def pour(self, into: Callable[[memoryview], None]) -> None:
        """Gives ``into`` what ``take`` has not taken, in parts that are its own until it returns; then ``finish``.

        They go by way of a buffer that stays in a processor's cache, so that memory is written where ``into`` writes.
        """
        buffer = np.empty(min(_POURED, self.size - self._at), np.uint8).data
        while self._at < self.size:
            count = self._filled_part(buffer[: self.size - self._at], self._at)
            if not count:
                raise self.damaged()
            self._sum.update(buffer[:count])
            into(buffer[:count])
            self._at += count
        self.finish()

    def verify(self) -> None:
        """Reads all of the blob, wherever ``take`` is, and raises TenantQuarantined if it is not what was written."""
        whole, at = BlobSum(self._blob.checksum), 0
        while at < self.size:
            part = self.peek(at, min(_PART, self.size - at))
            whole.update(part)
            at += len(part)
        if whole.text() != self._blob.checksum:
            raise self.damaged()

    def finish(self) -> None:
        """Raises TenantQuarantined unless all of the blob was taken and is what was written."""
        if self._at != self.size or self._filled_part(memoryview(bytearray(1)), self.size):
            raise self.damaged()
        if self._sum.text() != self._blob.checksum:
            raise self.damaged()

    def _filled(self, offset: int, size: int, seen: Callable[[memoryview], object]) -> memoryview:
        if offset < 0 or not 0 <= size <= self.size - offset:
            raise self.damaged()
        # memory that is not cleared first, since all of it is written
        data = np.empty(size, np.uint8).data
        done = 0
        while done < size:
            part = data[done : done + _PART]
            count = self._filled_part(part, offset + done)
            if not count:
                raise self.damaged()
            seen(part[:count])
            done += count
        return data

    def _filled_part(self, part: memoryview, offset: int) -> int:
        try:
            return self._source.read_at(part, offset)
        except FileNotFoundError as error:
            self._gone(error)
        except OSError as error:
            raise failure(error, "reading a blob") from error
