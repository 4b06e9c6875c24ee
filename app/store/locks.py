"""One lock per tenant, so that one tenant's slow disk operation keeps nobody else waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from app.errors import StoreFailed


class _Entry:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0


class TenantLocks:
    """Locks exist only while somebody holds or awaits them. Not re-entrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[str, _Entry] = {}
        self._closed = False

    @contextmanager
    def holding(self, tenant: str) -> Iterator[None]:
        """Raises StoreFailed once closed."""
        with self._changed:
            self.check()
            entry = self._entries.setdefault(tenant, _Entry())
            entry.users += 1
        try:
            with entry.lock:
                yield
        finally:
            with self._changed:
                entry.users -= 1
                if not entry.users:
                    del self._entries[tenant]
                    self._changed.notify_all()

    def check(self) -> None:
        """Raises StoreFailed once closed."""
        if self._closed:
            raise StoreFailed("the store is closed")

    def close(self) -> None:
        """Refuses every later ``holding`` and waits for those under way."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._entries)
