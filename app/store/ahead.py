"""Empty files made ahead for the blocks that a tenant's next commits will bring.

A new file needs its directory synced before anything may name it. Made some at a time, they share one such sync, and a
commit syncs two files only: the block's and the journal. Nothing on the disk names those that are unused: a start
sweeps them away.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from app.store.files import FileSystem, remove_quietly

# a tenant's first block of this server's life is made alone, since there may be no second one
MADE_AT_ONCE = 16
_TENANTS = 512


class Ahead:
    """Files by tenant and version; ``take`` and ``forget`` are called under the tenant's lock."""

    def __init__(self, files: FileSystem, new_name: Callable[[int, str], str]) -> None:
        self._files = files
        self._new_name = new_name
        self._guard = threading.Lock()
        self._made: OrderedDict[str, tuple[Path, dict[int, str]]] = OrderedDict()

    def take(self, tenant: str, directory: Path, version: int) -> str:
        """The name of an empty file in ``directory``, durably there, for the block of ``version``. Raises OSError."""
        with self._guard:
            known = tenant in self._made
            _, made = self._made.pop(tenant, (directory, {}))
        # after a rollback they are named for other versions
        name = made.pop(version, None)
        if name is None:
            self._remove(directory, made)
            made = self._make(directory, range(version, version + (MADE_AT_ONCE if known else 1)))
            name = made.pop(version)
        with self._guard:
            self._made[tenant] = directory, made
            old = self._made.popitem(last=False)[1] if len(self._made) > _TENANTS else None
        if old is not None:
            self._remove(*old)
        return name

    def _make(self, directory: Path, versions: range) -> dict[int, str]:
        made: dict[int, str] = {}
        try:
            for version in versions:
                made[version] = self._new_name(version, "block")
                try:
                    self._files.create(directory / made[version]).close()
                except OSError:
                    # it may be there all the same; and there may have been room for fewer
                    remove_quietly(self._files, directory / made.pop(version))
                    if not made:
                        raise
                    break
            self._files.sync_directory(directory)
        except OSError:
            self._remove(directory, made)
            raise
        return made

    def _remove(self, directory: Path, made: dict[int, str]) -> None:
        for name in made.values():
            remove_quietly(self._files, directory / name)

    def forget(self, tenant: str) -> None:
        """Whatever lies there is somebody else's to remove: the tenant is gone, or is swept."""
        with self._guard:
            self._made.pop(tenant, None)

    def names(self, tenant: str) -> set[str]:
        """Of the files that wait for their blocks."""
        with self._guard:
            _, made = self._made.get(tenant, (None, {}))
            return set(made.values())
