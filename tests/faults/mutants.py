"""Seeded bugs of the disk store, each of which the exploration must find: ``python -m tests.faults.mutants``.

A mutant is a patch of the store for the time of one exploration. Those of the disk stand for a call that the store
forgot to make.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

import app.store.blobs as blobs
import app.store.files as files
import app.store.histories as histories
import app.store.lineages as lineages
import app.store.manifests as manifests
import app.store.staging as staging
import app.store.trash as trash
from app.errors import StoreFailed, TenantNotFound
from app.store.base import BlobRef, BlockRecord, Manifest
from app.store.disk import DiskStore
from app.store.journal import Head
from app.store.records import blob_checksum, seal
from tests.faults import ahead_mutants, journal_mutants
from tests.faults.exploration import Violation, explore
from tests.store.memorydisk import MemoryDisk, MemoryFile

Patch = Callable[[], Any]
STATES = 12_000
_CALM = 60
# one that shows in calls that fail alone is found sooner by scripts that do not crash besides: each takes a fraction of
# the time. Which of them finds it hangs on threads.
_CALM_FOR = {"a failed append is taken for none": 600}


def _unsynced_files(*kinds: str) -> Patch:
    """Files whose names end so are never synced."""

    def patch() -> Any:
        sync = MemoryFile.sync

        def forgetful(self: MemoryFile) -> None:
            if not self._path.name.endswith(kinds):
                sync(self)

        return mock.patch.object(MemoryFile, "sync", forgetful)

    return patch


def _unsynced_directories(chosen: Callable[[Path], bool]) -> Patch:
    def patch() -> Any:
        sync = MemoryDisk.sync_directory

        def forgetful(self: MemoryDisk, path: Path) -> None:
            if not chosen(path):
                sync(self, path)

        return mock.patch.object(MemoryDisk, "sync_directory", forgetful)

    return patch


def _is_tenant(path: Path) -> bool:
    return len(path.name) == 32 and path.parent.parent.name == "tenants"


def _patched(target: object, name: str, make: Callable[[Any], Any]) -> Patch:
    """``target.name`` replaced by what ``make`` makes of it."""

    def patch() -> Any:
        # a static method is one again
        original = getattr(target, name)
        made = make(original)
        kept = target.__dict__.get(name) if isinstance(target, type) else None
        return mock.patch.object(target, name, staticmethod(made) if isinstance(kept, staticmethod) else made)

    return patch


def _all(*patches: Patch) -> Patch:
    @contextmanager
    def together() -> Iterator[None]:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch())
            yield

    return together


# ---------------------------------------------------------------- the bugs


def _written_in_place(_: Any) -> Any:
    def replace(fs: files.FileSystem, path: Path, data: bytes) -> None:
        if fs.exists(path):
            fs.remove(path)
        files.write_synced(fs, path, data)
        fs.sync_directory(path.parent)

    return replace


def _rename_unsynced(_: Any) -> Any:
    def replace(fs: files.FileSystem, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        if fs.exists(temporary):
            fs.remove(temporary)
        files.write_synced(fs, temporary, data)
        fs.rename(temporary, path)

    return replace


def _temporary_left(_: Any) -> Any:
    def replace(fs: files.FileSystem, path: Path, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        files.write_synced(fs, temporary, data)
        fs.rename(temporary, path)
        fs.sync_directory(path.parent)

    return replace


def _synced_again(_: Any) -> Any:
    def write(file: files.File, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            try:
                file.sync()
            except OSError:
                file.sync()
        finally:
            file.close()

    return write


def _half_written(_: Any) -> Any:
    def write(file: files.File, data: bytes) -> None:
        """Takes one write for all of it."""
        try:
            file.write(memoryview(data))
            file.sync()
        finally:
            file.close()

    return write


def _manifest_first(_: Any) -> Any:
    def commit(
        self: DiskStore, tenant: str, expected_version: int, blob: bytes, *,
        time: float, tokens: int, text: Any = None, idempotency: Any = None, lineage: int | None = None,
        created: float | None = None,
    ) -> Manifest:  # fmt: skip
        with self._locks.holding(tenant):
            old = self._require(tenant)
            lineages.require_version(old, expected_version, lineage, created)
            ref = BlobRef(self._blobs.new_name(expected_version + 1, "block"), len(blob), blob_checksum(blob))
            record = BlockRecord(expected_version + 1, ref, time, tokens, text, idempotency)
            new = self._manifests.swap(old, lineages.committed(old, record), [ref])
            self._blobs.put(tenant, ref.name, blob)
            return new

    return commit


def _acknowledged_early(commit: Any) -> Any:
    """The block is in the cache, and the disk hears of it with the next change."""

    def early(self: DiskStore, tenant: str, expected_version: int, blob: bytes, **named: Any) -> Manifest:
        swap = self._manifests.swap

        def only_remember(old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
            self._manifests.remember(new)
            return new

        with mock.patch.object(self._manifests, "swap", only_remember if expected_version % 2 else swap):
            done: Manifest = commit(self, tenant, expected_version, blob, **named)
        return done

    return early


def _failure_ignored(swap: Any) -> Any:
    def ignoring(self: manifests.Manifests, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        try:
            swap(self, old, new, fresh)
        except StoreFailed:
            self.remember(new)
        return new

    return ignoring


def _deleted_first(swap: Any) -> Any:
    def deleting(self: manifests.Manifests, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        self._blobs.discard(new.tenant, lineages.dropped(old, new))
        done: Manifest = swap(self, old, new, fresh)
        return done

    return deleting


def _never_deleted(_: Any) -> Any:
    return lambda old, new: []


def _nothing(_: Any) -> Any:
    return lambda *arguments, **named: None


def _names_without_chance(_: Any) -> Any:
    return lambda version, kind: f"{version:010d}-{0:016x}.{kind}"


def _first_version_kept(_: Any) -> Any:
    def at_version(manifest: Manifest, version: int) -> Manifest:
        return msgspec.structs.replace(manifest, version=version)

    return at_version


def _same_lineage(_: Any) -> Any:
    return lambda old, version: lineages.at_version(old, version)


def _fork_by_name(_: Any) -> Any:
    def forked(
        source: Manifest, target: str, version: int | None, created: float, new_name: Any, reseal: Any
    ) -> tuple[Manifest, list[Any]]:
        kept = lineages.at_version(source, source.version if version is None else version)
        return msgspec.structs.replace(kept, tenant=target, created=created, lineage=0, archive=()), []

    return forked


def _fork_unarchived(_: Any) -> Any:
    return lambda self, source, target: None


def _moved_blobs(_: Any) -> Any:
    """A fork takes the source's file in place of a second name for it."""
    return lambda self, source, target: self.rename(source, target)


def _erased_in_place(_: Any) -> Any:
    """Blobs go first, one by one, and the manifest last."""

    def put(self: trash.Trash, tenant: str, manifest: Manifest | None) -> None:
        directory = self._home.directory(tenant)
        for name in sorted(self._files.list(directory)):
            self._files.remove(directory / name)
        self._files.remove_directory(directory)
        self._files.sync_directory(directory.parent)

    return put


def _left_in_trash(_: Any) -> Any:
    def empty(self: trash.Trash, tenant: str) -> Any:
        found = self._unfinished.pop(tenant, None)
        if found is None:
            return None
        self._files.sync_directory(self._home.directory(tenant).parent)
        self._files.sync_directory(self._home.trash)
        return found[1]

    return empty


def _staged_in_place(_: Any) -> Any:
    """A tenant is made where it is looked for."""

    def make(self: staging.Staging, tenant: str, fill: Callable[[Path], Manifest]) -> Manifest:
        directory = self._home.directory(tenant)
        if self._files.exists(directory):
            raise staging.TenantExists("this tenant exists already")
        if not self._files.exists(directory.parent):
            self._files.make_directory(directory.parent)
        self._files.sync_directory(self._home.tenants)
        self._files.make_directory(directory)
        manifest = fill(directory)
        files.write_synced(self._files, directory / "name", seal(tenant))
        files.write_synced(self._files, directory / "manifest", seal(Head(manifest)))
        self._files.sync_directory(directory)
        self._files.sync_directory(directory.parent)
        self._manifests.remember(manifest)
        return manifest

    return make


def _records_forgotten(extended: Any) -> Any:
    def extend(self: histories.Histories, old: Manifest, gone: list[BlockRecord]) -> Any:
        return extended(self, old, gone[:-1])

    return extend


def _keys_forgotten(_: Any) -> Any:
    """Idempotency keys are looked for in the blocks alone."""

    def find(self: histories.Histories, manifest: Manifest, key: str) -> list[BlockRecord]:
        return [r for r in manifest.blocks if r.idempotency is not None and r.idempotency.key == key]

    return find


def _swept_too_much(_: Any) -> Any:
    def sweep(self: blobs.Blobs, manifest: Manifest, journal: str | None) -> None:
        named = {"name", "manifest", journal, *(block.blob.name for block in manifest.blocks)}
        if manifest.snapshot is not None:
            named.add(manifest.snapshot.blob.name)
        found = self._files.list(self._home.directory(manifest.tenant))
        self.discard(manifest.tenant, [name for name in found if name not in named])

    return sweep


def _any_version(_: Any) -> Any:
    return lambda manifest, version, lineage=None, created=None: None


def _lineage_alone(require_lineage: Any) -> Any:
    return lambda manifest, lineage, created=None: require_lineage(manifest, lineage)


def _wrong_slot(committed: Any) -> Any:
    """The new block takes the place of the one before it."""

    def put(old: Manifest, record: BlockRecord) -> Manifest:
        new: Manifest = committed(old, record)
        if len(new.blocks) < 2:
            return new
        *first, before, last = new.blocks
        swapped = msgspec.structs.replace(before, blob=last.blob)
        return msgspec.structs.replace(new, blocks=(*first, swapped, last))

    return put


def _compacted_too_far(compacted: Any) -> Any:
    def further(old: Manifest, snapshot: Any, archive: Sequence[BlobRef]) -> Manifest:
        new: Manifest = compacted(old, snapshot, archive)
        return msgspec.structs.replace(new, blocks=(), version=snapshot.version)

    return further


def _cache_stays(_: Any) -> Any:
    return lambda self, tenant: None


def _absent_created(require: Any) -> Any:
    def lenient(self: DiskStore, tenant: str) -> Manifest:
        try:
            found: Manifest = require(self, tenant)
        except TenantNotFound:
            found = self._make(tenant, lambda staged: Manifest(tenant, 0, "", 0.0))
        return found

    return lenient


def _fork_overwrites(_: Any) -> Any:
    def make(self: staging.Staging, tenant: str, fill: Callable[[Path], Manifest]) -> Manifest:
        directory, staged = self._home.directory(tenant), self._home.new_staging()
        if self._files.exists(directory):
            files.remove_tree(self._files, directory)
            self._manifests.forget(tenant)
        if not self._files.exists(directory.parent):
            self._files.make_directory(directory.parent)
        self._files.sync_directory(self._home.tenants)
        self._files.make_directory(staged)
        manifest = fill(staged)
        files.write_synced(self._files, staged / "name", seal(tenant))
        files.write_synced(self._files, staged / "manifest", seal(Head(manifest)))
        self._files.sync_directory(staged)
        self._files.rename(staged, directory)
        self._files.sync_directory(directory.parent)
        self._manifests.remember(manifest)
        return manifest

    return make


MUTANTS: dict[str, Patch] = {
    "blocks are not synced": _unsynced_files(".block"),
    "snapshots are not synced": _unsynced_files(".snapshot"),
    "archives are not synced": _unsynced_files(".archive"),
    "manifests are not synced": _unsynced_files("manifest.tmp"),
    "a new tenant's manifest is not synced": _unsynced_files("manifest"),
    "a tenant's directory is not synced": _unsynced_directories(_is_tenant),
    "directories of tenants are not synced": _unsynced_directories(lambda p: len(p.name) == 2),
    "the directory of directories is not synced": _unsynced_directories(lambda p: p.name == "tenants"),
    "a staged tenant's directory is not synced": _unsynced_directories(lambda p: p.parent.name == "staging"),
    "the store's own directory is not synced": _unsynced_directories(lambda p: p.parent.name != "tenants"),
    "a manifest is written in place": _patched(manifests, "replace_durably", _written_in_place),
    "a manifest's rename is not synced": _patched(manifests, "replace_durably", _rename_unsynced),
    "a temporary file is in the way": _patched(manifests, "replace_durably", _temporary_left),
    "a failed sync is tried again": _patched(files, "_write_and_sync", _synced_again),
    "a short write is taken for a whole one": _patched(files, "_write_and_sync", _half_written),
    "the manifest is written before the block": _patched(DiskStore, "commit", _manifest_first),
    "acknowledged before it is durable": _patched(DiskStore, "commit", _acknowledged_early),
    "a failed manifest is taken for written": _patched(manifests.Manifests, "swap", _failure_ignored),
    "blobs are deleted before the manifest is swapped": _patched(manifests.Manifests, "swap", _deleted_first),
    "what was dropped is never deleted": _patched(manifests, "dropped", _never_deleted),
    "a failed swap is not settled": _patched(manifests.Manifests, "doubt", _nothing),
    "a blob's name is given twice": _patched(blobs.Blobs, "new_name", _names_without_chance),
    "any version may be committed": _all(
        _patched(lineages, "require_version", _any_version), _patched(lineages, "require_lineage", _nothing)
    ),
    "the lineage is not compared": _patched(lineages, "require_lineage", _nothing),
    "memories of one name are not told apart": _patched(lineages, "require_lineage", _lineage_alone),
    "a rollback stays in its lineage": _patched(lineages, "rolled_back", _same_lineage),
    "a rollback keeps the later blocks": _patched(lineages, "at_version", _first_version_kept),
    "a fork names the source's blobs": _patched(lineages, "forked", _fork_by_name),
    "a fork takes the source's blobs away": _patched(MemoryDisk, "link", _moved_blobs),
    "a fork forgets the archive": _patched(histories.Histories, "archive_of_fork", _fork_unarchived),
    "a tenant is made where it is looked for": _patched(staging.Staging, "make", _staged_in_place),
    "making a tenant overwrites another": _patched(staging.Staging, "make", _fork_overwrites),
    "erasing deletes the manifest last": _patched(trash.Trash, "put", _erased_in_place),
    "the erased stays in the trash": _patched(trash.Trash, "empty", _left_in_trash),
    "compaction forgets a record": _patched(histories.Histories, "extended", _records_forgotten),
    "idempotency keys of old blocks are forgotten": _patched(histories.Histories, "find", _keys_forgotten),
    "the sweep takes the archive": _patched(blobs.Blobs, "sweep", _swept_too_much),
    "nothing is swept": _patched(blobs.Blobs, "sweep", _nothing),
    "a block takes another's slot": _patched(lineages, "committed", _wrong_slot),
    "compaction drops the later blocks": _patched(lineages, "compacted", _compacted_too_far),
    "the cache outlives an erasure": _patched(manifests.Manifests, "forget", _cache_stays),
    "an absent tenant is made by a commit": _patched(DiskStore, "_require", _absent_created),
    **journal_mutants.MUTANTS,
    **ahead_mutants.MUTANTS,
}


def caught(name: str, states: int = STATES) -> str | None:
    """How the exploration found the mutant; None if it did not."""
    with MUTANTS[name]():
        try:
            explore(states, calm=_CALM_FOR.get(name, _CALM))
        except Violation as violation:
            return str(violation)
    return None


def main() -> int:
    missed = []
    for name in MUTANTS:
        how = caught(name)
        print(f"{'caught' if how else 'MISSED':8}{name}: {(how or '')[:110]}", flush=True)
        missed += [] if how else [name]
    print(f"{len(MUTANTS) - len(missed)} of {len(MUTANTS)} caught")
    return min(len(missed), 1)


if __name__ == "__main__":
    sys.exit(main())
