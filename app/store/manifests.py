"""The one file per tenant that says what is true, its journal, and what becomes of them when writing fails.

A block is appended to the journal; every other change writes the manifest anew, with a journal of its own.
All methods but ``cached`` are called under the tenant's lock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.errors import StoreFailed
from app.store import journal, lineages
from app.store.base import BlobRef, Manifest
from app.store.blobs import Blobs
from app.store.files import (
    FileSystem,
    failure,
    remove_quietly,
    replace_durably,
    sync_file,
    translated,
    write_over,
    write_synced,
)
from app.store.home import Home
from app.store.journal import Head
from app.store.lineages import dropped
from app.store.parts import new_name, quarantined
from app.store.records import Damaged, seal

_CACHED = 512


@dataclass(frozen=True)
class _Known:
    """A tenant's manifest, and its journal: ``used`` of the ``room`` bytes that each of its halves has."""

    manifest: Manifest
    journal: str | None = None
    used: int = 0
    room: int = 0


class Manifests:
    """Reads, caches and changes manifests."""

    def __init__(self, home: Home, files: FileSystem, blobs: Blobs) -> None:
        self._home = home
        self._files = files
        self._blobs = blobs
        self._guard = threading.Lock()
        self._cache: OrderedDict[str, _Known] = OrderedDict()
        self._swept: set[str] = set()
        self._unsure: set[str] = set()
        self._fans: set[Path] = set()

    # ------------------------------------------------------------ reading

    def cached(self, tenant: str) -> Manifest | None:
        with self._guard:
            known = self._cache.get(tenant)
            if known is None:
                return None
            self._cache.move_to_end(tenant)
            return known.manifest

    def load(self, tenant: str) -> Manifest | None:
        """Raises TenantQuarantined, StoreFailed."""
        manifest = self.cached(tenant)
        if manifest is not None:
            return manifest
        if tenant in self._unsure:
            self._settle(tenant)
        directory = self._home.directory(tenant)
        with translated("reading a manifest"):
            try:
                data = self._files.read(directory / "manifest")
            except FileNotFoundError:
                if self._files.exists(directory):
                    raise quarantined("its manifest is missing", f"{directory.name}/manifest") from None
                return None
            try:
                known = self._known(directory, data, tenant)
            except Damaged as error:
                raise quarantined(
                    f"its manifest is damaged ({error})", f"{directory.name}/manifest"
                ) from error
            # once per tenant and start, and again after a failure
            if tenant not in self._swept:
                self._sync(directory, known)
                self._blobs.sweep(known.manifest, known.journal)
                with self._guard:
                    self._swept.add(tenant)
        self._remember(known)
        return known.manifest

    def _known(self, directory: Path, data: bytes, tenant: str) -> _Known:
        """Reads the journal too. Raises Damaged, OSError."""
        head = journal.unseal_head(data, tenant)
        if head.journal is None:
            return _Known(head.manifest)
        try:
            entries = self._files.read(directory / head.journal)
        except FileNotFoundError as error:
            raise Damaged("its journal is missing") from error
        if len(entries) != head.size:
            raise Damaged("its journal has another size")
        manifest, used, whole = journal.replayed(head, entries)
        room = len(entries) // 2
        # where the halves differ nothing is appended any more: the next change writes the manifest anew
        return _Known(manifest, head.journal, used if whole else room, room)

    def _sync(self, directory: Path, known: _Known) -> None:
        """What a killed server wrote last may be seen and not be durable yet; from here on it is told of."""
        try:
            if known.journal is not None:
                sync_file(self._files, directory / known.journal)
            self._files.sync_directory(directory)
            # that the tenant is there at all; what this server makes there is synced by itself
            if directory.parent not in self._fans:
                self._files.sync_directory(directory.parent)
                with self._guard:
                    self._fans.add(directory.parent)
        except OSError:
            # another sync of the same file would succeed and save nothing
            self.doubt(known.manifest.tenant)
            raise

    def remember(self, manifest: Manifest) -> None:
        """Of a tenant just made: it has no journal."""
        self._remember(_Known(manifest))

    def _remember(self, known: _Known) -> None:
        tenant = known.manifest.tenant
        with self._guard:
            self._cache[tenant] = known
            self._cache.move_to_end(tenant)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)

    def forget(self, tenant: str) -> None:
        """The tenant is gone, or its manifest must be read from the disk again."""
        with self._guard:
            self._cache.pop(tenant, None)
            self._swept.discard(tenant)
        self._blobs.forget(tenant)

    # ------------------------------------------------------------ writing

    def swap(self, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        """Replaces ``old`` durably by ``new``, which names the blobs ``fresh`` besides, and returns it.

        Then the blobs are removed that only ``old`` named. Raises StoreFull or StoreFailed if ``old`` still
        holds (``fresh`` are removed then), StoreFailed if nobody can tell; that is settled before the tenant
        is next read.
        """
        known = self._of(old)
        entry = self._entry(known, new)
        try:
            after = self._append(known, new, entry) if entry else self._rewrite(known, new)
        except OSError as error:
            if self._restored(known) if entry else self._shown(old.tenant) == known:
                self._blobs.discard(old.tenant, [ref.name for ref in fresh])
                raise failure(error, "writing a manifest") from error
            self.doubt(new.tenant)
            raise StoreFailed("the store failed while writing a manifest: nothing is acknowledged") from error
        self._remember(after)
        self._blobs.discard(new.tenant, [*dropped(old, new), *_left(known, after)])
        return new

    def _of(self, manifest: Manifest) -> _Known:
        with self._guard:
            known = self._cache.get(manifest.tenant)
            if known is not None and known.manifest is manifest:
                return known
            # others have pushed it out of the cache: its journal is swept when it is next read
            self._swept.discard(manifest.tenant)
        return _Known(manifest)

    def _entry(self, known: _Known, new: Manifest) -> bytes:
        """What to append to the journal for ``new``; nothing if that does not go there."""
        record = lineages.appended(known.manifest, new)
        if record is None or known.journal is None:
            return b""
        entry = journal.entry(known.journal, record)
        return entry if known.used + len(entry) <= known.room else b""

    def _append(self, known: _Known, new: Manifest, entry: bytes) -> _Known:
        """Writes the entry into both halves of the journal. Raises OSError: it is not known what is in it then."""
        assert known.journal is not None
        path = self._home.directory(new.tenant) / known.journal
        write_over(self._files, path, entry, [known.used, known.room + known.used])
        return _Known(new, known.journal, known.used + len(entry), known.room)

    def _restored(self, known: _Known) -> bool:
        """Writes the manifest of before a failed append anew, with another journal: a sync that failed is not tried
        again on the same file."""
        try:
            before = self._rewrite(known, known.manifest)
        except OSError:
            return False
        self._remember(before)
        self._blobs.discard(known.manifest.tenant, _left(known, before))
        return True

    def _rewrite(self, known: _Known, new: Manifest) -> _Known:
        """Replaces the manifest, with an empty journal for a tenant whose memory is being written. Raises OSError."""
        directory = self._home.directory(new.tenant)
        after, size = _Known(new), 2 * known.room
        record = lineages.appended(known.manifest, new)
        if record is not None:
            size = journal.size_for(record.blob.size)
        if size:
            after = _Known(new, new_name(new.version, "journal"), 0, size // 2)
        if after.journal is not None:
            try:
                write_synced(self._files, directory / after.journal, bytes(size))
                self._files.sync_directory(directory)
            except OSError:
                # a disk that has no room for a journal may have some for the manifest
                remove_quietly(self._files, directory / after.journal)
                after, size = _Known(new), 0
        try:
            replace_durably(self._files, directory / "manifest", seal(Head(new, after.journal, size)))
        except OSError:
            shown = self._shown(new.tenant)
            if after.journal is not None and shown is not None and shown.journal != after.journal:
                remove_quietly(self._files, directory / after.journal)
            raise
        return after

    def _shown(self, tenant: str) -> _Known | None:
        """What the disk shows, which need not be durable; None if it cannot be read."""
        directory = self._home.directory(tenant)
        with suppress(OSError, Damaged):
            return self._known(directory, self._files.read(directory / "manifest"), tenant)
        return None

    def doubt(self, tenant: str) -> None:
        """A sync failed: what is seen now might not outlive a crash."""
        self.forget(tenant)
        with self._guard:
            self._unsure.add(tenant)

    def _settle(self, tenant: str) -> None:
        """Makes what the disk shows now durable, by writing it once more: a sync that failed proves nothing
        when it is repeated. Raises StoreFailed, and the tenant stays in doubt."""
        directory = self._home.directory(tenant)
        try:
            # a damaged one is left as it is, for the reader to find
            with suppress(FileNotFoundError, Damaged):
                known = self._known(directory, self._files.read(directory / "manifest"), tenant)
                replace_durably(self._files, directory / "manifest", seal(Head(known.manifest)))
            if self._files.exists(directory.parent):
                self._files.sync_directory(directory.parent)
            self._files.sync_directory(self._home.tenants)
        except OSError as error:
            raise StoreFailed("the store cannot tell whether this tenant's last change is durable") from error
        with self._guard:
            self._unsure.discard(tenant)


def _left(known: _Known, after: _Known) -> list[str]:
    """The journal that nothing names any more."""
    return [known.journal] if known.journal is not None and known.journal != after.journal else []
