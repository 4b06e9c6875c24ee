"""Seeded bugs of the files that the disk store makes ahead of its commits, beside those of ``mutants``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from app.store.ahead import Ahead
from app.store.files import FileSystem
from app.store.parts import new_name

Patch = Callable[[], Any]


class _Forgetful:
    """A file system whose directories are not synced."""

    def __init__(self, files: FileSystem) -> None:
        self._files = files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def sync_directory(self, path: Path) -> None: ...


def _unsynced() -> Any:
    init = Ahead.__init__

    def forgetful(self: Ahead, files: FileSystem, new_name: Any) -> None:
        init(self, _Forgetful(files), new_name)  # type: ignore[arg-type]

    return mock.patch.object(Ahead, "__init__", forgetful)


def _given_twice() -> Any:
    """A file that was filled stays among those that wait, for a commit that comes to its version again."""
    take = Ahead.take

    def twice(self: Ahead, tenant: str, directory: Path, version: int) -> str:
        name = take(self, tenant, directory, version)
        self._made[tenant][1][version] = name
        return name

    return mock.patch.object(Ahead, "take", twice)


def _not_there() -> Any:
    """The names are made ahead and the files are not."""

    def names(self: Ahead, directory: Path, versions: range) -> dict[int, str]:
        return {version: new_name(version, "block") for version in versions}

    return mock.patch.object(Ahead, "_make", names)


def _left() -> Any:
    """What a rollback makes useless stays."""
    return mock.patch.object(Ahead, "_remove", return_value=None)


MUTANTS: dict[str, Patch] = {
    "files made ahead are not synced in their directory": _unsynced,
    "a file made ahead is given twice": _given_twice,
    "files made ahead are not there": _not_there,
    "files made ahead for versions that do not come stay": _left,
}
