"""Requests that were in the worker when it ended. One of them may be why, so none is tried a third time."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import msgspec

from app.errors import RequestCrashed
from app.messages import Generate, Request, Score, Update

MOST_CRASHES = 2
# remembered at most, and for so long
_MOST = 4096
_SECONDS = 600.0
# of idempotency keys that the server makes, so that its own retries are safe
SERVER_KEY = "server-made:"


def fingerprint(request: Request) -> bytes:
    """The same for a request that is sent again: of tenant and contents, without ids, deadlines and keys of ours."""
    changes: dict[str, object] = {}
    if isinstance(request, Generate | Score):
        changes["deadline"] = None
    if isinstance(request, Update) and (request.idempotency_key or "").startswith(SERVER_KEY):
        changes["idempotency_key"] = None
    bare = msgspec.structs.replace(request, id="", **changes)
    return hashlib.blake2b(msgspec.msgpack.encode(bare), digest_size=16).digest()


class Suspects:
    """How often each request was in the worker when it ended. The oldest are forgotten; nothing of a text is kept."""

    def __init__(self, most: int = _MOST, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        # fingerprint -> crashes, time and number of the last; in order of time
        self._crashes: dict[bytes, tuple[int, float, int]] = {}

    def __len__(self) -> int:
        return len(self._crashes)

    def blame(self, request: Request, end: int) -> int:
        """Notes that the worker ended, for the ``end``-th time, with ``request`` in it; how often by now."""
        self._forget_old()
        mark = fingerprint(request)
        count, _, last = self._crashes.pop(mark, (0, 0.0, 0))
        # the same sent twice at once is one suspect
        count += last != end
        self._crashes[mark] = (count, self._clock(), end)
        if len(self._crashes) > self._most:
            del self._crashes[next(iter(self._crashes))]
        return count

    def check(self, request: Request) -> None:
        """Raises RequestCrashed for what has been in the worker at two of its ends."""
        self._forget_old()
        if self._crashes and self._crashes.get(fingerprint(request), (0,))[0] >= MOST_CRASHES:
            raise crashed()

    def _forget_old(self) -> None:
        old = self._clock() - _SECONDS
        while self._crashes and self._crashes[first := next(iter(self._crashes))][1] <= old:
            del self._crashes[first]


def crashed() -> RequestCrashed:
    return RequestCrashed(
        f"the worker ended {MOST_CRASHES} times with this request in it: it is not tried again, and refused for "
        f"{_SECONDS / 60:.0f} minutes if it is sent again"
    )
