"""Free memory goes back to the system.

glibc gives back what lies free at the end of a heap. Between what is kept, loads and steps leave holes that are used
again, but the process stays as large as it ever was, and after half an hour of changing load is some 20 MB larger than
what is in use in it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

from app.errors import ServiceError
from app.memory.residency import Submit

EVERY_SECONDS = 30.0


def trimmer() -> Callable[[], object] | None:
    """Gives back whole free pages, wherever they lie; None where the C library has no such call. Any thread."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda: trim(0)


class Heap:
    """Has what is free given back every ``EVERY_SECONDS``, in a thread of ``submit``'s."""

    def __init__(self, submit: Submit, trim: Callable[[], object] | None) -> None:
        self._submit, self._trim = submit, trim
        self._next = 0.0
        self._under_way = False

    def step(self, now: float) -> None:
        """``now`` in seconds of any clock that does not jump."""
        if self._trim is None or self._under_way or now < self._next:
            return
        self._next = now + EVERY_SECONDS
        self._under_way = True
        self._submit(self._trim, self._done)

    def _done(self, result: object, error: ServiceError | None) -> None:
        self._under_way = False
