"""Seeded bugs of the disk store's journals, beside those of ``mutants``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import app.store.journal as journal
import app.store.manifests as manifests
from app.store.base import Manifest
from tests.store.memorydisk import MemoryDisk, MemoryFile

Patch = Callable[[], Any]


def _unsynced() -> Any:
    sync = MemoryFile.sync

    def forgetful(self: MemoryFile) -> None:
        if self._path.suffix != ".journal":
            sync(self)

    return mock.patch.object(MemoryFile, "sync", forgetful)


def _named_early() -> Any:
    """The manifest names its journal before the directory does."""
    rewrite, sync = manifests.Manifests._rewrite, MemoryDisk.sync_directory
    # of the disk it is, since what a crash leaves is opened on others meanwhile
    replacing: set[int] = set()

    def early(self: manifests.Manifests, known: Any, new: Manifest) -> Any:
        replacing.add(id(self._files))
        try:
            return rewrite(self, known, new)
        finally:
            replacing.discard(id(self._files))

    def forgetful(self: MemoryDisk, path: Path) -> None:
        if id(self) in replacing:
            replacing.discard(id(self))
        else:
            sync(self, path)

    @contextmanager
    def both() -> Iterator[None]:
        with (
            mock.patch.object(manifests.Manifests, "_rewrite", early),
            mock.patch.object(MemoryDisk, "sync_directory", forgetful),
        ):
            yield

    return both()


def _from_the_start() -> Any:
    """A server that opens a journal appends at its beginning."""
    replayed = journal.replayed

    def wrong(head: journal.Head, data: bytes) -> tuple[Manifest, int, bool]:
        manifest, _, whole = replayed(head, data)
        return manifest, 0, whole

    return mock.patch.object(journal, "replayed", wrong)


def _failure_forgotten() -> Any:
    """A failed append leaves the journal as it is, and says that nothing was changed."""
    return mock.patch.object(manifests.Manifests, "_restored", return_value=True)


def _believed_at_a_start() -> Any:
    """What a killed server left is synced again, on the same file, when that has failed."""

    def sync(self: manifests.Manifests, directory: Path, known: Any) -> None:
        if known.journal is not None:
            manifests.sync_file(self._files, directory / known.journal)
        self._files.sync_directory(directory)

    return mock.patch.object(manifests.Manifests, "_sync", sync)


def _kept() -> Any:
    """A manifest that is written anew keeps its journal, with the records that it holds by now itself."""
    rewrite = manifests.Manifests._rewrite

    def keep(self: manifests.Manifests, known: Any, new: Manifest) -> Any:
        if known.journal is None:
            return rewrite(self, known, new)
        directory = self._home.directory(new.tenant)
        head = journal.Head(new, known.journal, 2 * known.room)
        manifests.replace_durably(self._files, directory / "manifest", manifests.seal(head))
        return manifests._Known(new, known.journal, known.used, known.room)

    return mock.patch.object(manifests.Manifests, "_rewrite", keep)


def _not_read() -> Any:
    def empty(head: journal.Head, data: bytes) -> tuple[Manifest, int, bool]:
        return head.manifest, 0, True

    return mock.patch.object(journal, "replayed", empty)


def _never_left() -> Any:
    return mock.patch.object(manifests, "_left", return_value=[])


MUTANTS: dict[str, Patch] = {
    "journals are not synced": _unsynced,
    "a journal is named before it is in its directory": _named_early,
    "a restarted server appends at its journal's beginning": _from_the_start,
    "a failed append is taken for none": _failure_forgotten,
    "a failed sync of a start is tried again": _believed_at_a_start,
    "a manifest written anew keeps its journal": _kept,
    "journals are not read": _not_read,
    "old journals are never deleted": _never_left,
}
