"""Which tenants a disk store holds, by name. Many names are read beside whatever else a server does as it starts."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence

from app.errors import StoreFailed
from app.store.home import Home

_READ_AT_ONCE = 200


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Those of the sorted ``names`` that ``only`` means, as ``Store.tenants`` has it; sorted."""
    found: set[str] = set()
    for wanted in only:
        beginning = wanted.removesuffix("*")
        place = bisect_left(names, beginning)
        if beginning == wanted:
            if wanted in names[place : place + 1]:
                found.add(wanted)
            continue
        while place < len(names) and names[place].startswith(beginning):
            found.add(names[place])
            place += 1
    return sorted(found)


class Names:
    """Lists what is there when it is made, without reading any of it; ``all`` waits until every name has been read.

    A tenant whose name is damaged wherever it is written is in no list; it is reached by name only. Raises StoreFailed.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._guard = threading.Lock()
        self._names: dict[str, str] = {}
        # all of them in order, until one comes or goes; never changed in place
        self._sorted: list[str] | None = None
        self._unread = set(home.ids())
        self._read = threading.Event()
        self._closed = False
        self._reader: threading.Thread | None = None
        if len(self._unread) <= _READ_AT_ONCE:
            self._read_all()
        else:
            self._reader = threading.Thread(target=self._read_all, name="names", daemon=True)
            self._reader.start()

    def _read_all(self) -> None:
        try:
            for id in sorted(self._unread):
                if self._closed:
                    return
                name = self._home.name(id)
                with self._guard:
                    # otherwise it was erased, or made anew, meanwhile
                    if id in self._unread:
                        self._unread.discard(id)
                        if name is not None:
                            self._names[id] = name
                            self._sorted = None
        finally:
            self._read.set()

    def add(self, id: str, name: str) -> None:
        with self._guard:
            self._unread.discard(id)
            if id not in self._names:
                self._names[id] = name
                self._sorted = None

    def drop(self, id: str) -> None:
        with self._guard:
            self._unread.discard(id)
            if self._names.pop(id, None) is not None:
                self._sorted = None

    def all(self) -> Sequence[str]:
        """Sorted. Raises StoreFailed if the store is closed before they are read."""
        self._read.wait()
        with self._guard:
            if self._closed and self._unread:
                raise StoreFailed("the store is closed")
            if self._sorted is None:
                self._sorted = sorted(self._names.values())
            return self._sorted

    def close(self) -> None:
        self._closed = True
        if self._reader is not None:
            self._reader.join()
