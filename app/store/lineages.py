"""What each operation makes of a manifest. Pure functions that every store swaps its manifests by.

None of them writes anything: the store first makes the new blobs durable, then swaps ``old`` for what is
returned here, then deletes the blobs that are ``dropped``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import msgspec

from app.errors import VersionConflict, VersionNotKept
from app.store.base import BlobRef, BlockRecord, Manifest, Snapshot

# gives a name never used before for a blob of this version and kind: "block", "snapshot" or "archive"
NewName = Callable[[int, str], str]
# seconds for which it is kept when blocks were written that are gone, and how many of them
UNDONE_FOR = 86_400.0
_MOST_UNDONE = 2000
# one blob of a fork: the source's, and the one that must be made of it
Copy = tuple[BlobRef, BlobRef]


def oldest(manifest: Manifest) -> int:
    """The oldest version that the store can still give."""
    return 0 if manifest.snapshot is None else manifest.snapshot.version


def blobs_of(manifest: Manifest) -> list[BlobRef]:
    """All blobs that the manifest needs: snapshot, blocks, archive."""
    snapshot = [] if manifest.snapshot is None else [manifest.snapshot.blob]
    return [*snapshot, *(block.blob for block in manifest.blocks), *manifest.archive]


def dropped(old: Manifest, new: Manifest) -> list[str]:
    """Names of the blobs that ``old`` needs and ``new`` does not."""
    kept = {ref.name for ref in blobs_of(new)}
    return [ref.name for ref in blobs_of(old) if ref.name not in kept]


def require_version(
    manifest: Manifest, version: int, lineage: int | None = None, created: float | None = None
) -> None:
    """Raises VersionConflict unless the manifest is at ``version``, of ``lineage`` and ``created`` (None: any)."""
    if manifest.version != version:
        raise VersionConflict(f"the memory is at version {manifest.version}, not {version}", retry_after=0.1)
    require_lineage(manifest, lineage, created)


def require_lineage(manifest: Manifest, lineage: int | None, created: float | None = None) -> None:
    """Raises VersionConflict unless the memory is the one that was ``created`` then and has ``lineage`` still.

    None is any. What is under way while another server erases the tenant and makes it anew must not land in the
    new memory, whose versions and lineages begin at the same numbers.
    """
    if created is not None and manifest.created != created:
        raise VersionConflict("the tenant was erased and made anew meanwhile", retry_after=0.1)
    if lineage is not None and manifest.lineage != lineage:
        raise VersionConflict("the memory was rolled back or rebuilt meanwhile", retry_after=0.1)


def require_same(manifest: Manifest, old: Manifest) -> None:
    """Raises VersionConflict unless both describe one memory; compactions between them do not matter."""
    require_version(manifest, old.version, old.lineage, old.created)
    if (manifest.seed, manifest.fingerprint) != (old.seed, old.fingerprint):
        raise VersionConflict("the tenant was erased and made anew meanwhile", retry_after=0.1)


def require_beginning(manifest: Manifest, snapshot: bytes | None, records: Sequence[BlockRecord]) -> None:
    """Raises ValueError unless a memory can begin so, see ``Store.create``."""
    if blobs_of(manifest):
        raise ValueError("the manifest of a memory that begins names no blobs")
    if manifest.version < 0 or (snapshot is None and (manifest.version or records)):
        raise ValueError("without a snapshot a memory begins at version 0, with no records")
    bounds = [0, *(record.version for record in records), manifest.version + 1]
    if any(later <= earlier for earlier, later in pairwise(bounds)):
        raise ValueError("records rise in version, from 1 at least to the memory's own at most")


# ------------------------------------------------------------ what becomes of a manifest


def begun(manifest: Manifest, snapshot: BlobRef | None, archive: Sequence[BlobRef] = ()) -> Manifest:
    """A memory's beginning: at ``manifest.version``, with a snapshot of it or (at version 0) without."""
    first = None if snapshot is None else Snapshot(manifest.version, snapshot)
    return msgspec.structs.replace(manifest, snapshot=first, blocks=(), archive=tuple(archive))


def committed(old: Manifest, record: BlockRecord) -> Manifest:
    """``old`` with one block more."""
    return msgspec.structs.replace(old, version=record.version, blocks=(*old.blocks, record))


def appended(old: Manifest, new: Manifest) -> BlockRecord | None:
    """The block that was committed, if ``new`` differs from ``old`` in that alone."""
    record = new.blocks[-1] if new.blocks else None
    if record is None or record.version != old.version + 1 or new != committed(old, record):
        return None
    return record


def compacted(old: Manifest, snapshot: Snapshot, archive: Sequence[BlobRef]) -> Manifest:
    """``old`` with ``snapshot`` in place of the blocks up to its version, whose records ``archive`` holds."""
    later = tuple(block for block in old.blocks if block.version > snapshot.version)
    return msgspec.structs.replace(old, snapshot=snapshot, blocks=later, archive=tuple(archive))


def at_version(manifest: Manifest, version: int) -> Manifest:
    """The manifest without the blocks after ``version``. Raises VersionNotKept.

    The archive stays: its records are older than the snapshot, and that is no newer than ``version``.
    """
    if not oldest(manifest) <= version <= manifest.version:
        raise VersionNotKept(
            f"version {version} is not kept: those from {oldest(manifest)} to {manifest.version} are"
        )
    blocks = tuple(block for block in manifest.blocks if block.version <= version)
    return msgspec.structs.replace(manifest, version=version, blocks=blocks)


def rolled_back(old: Manifest, version: int) -> Manifest:
    """``old`` at ``version``, in the next lineage. Raises VersionNotKept."""
    new = at_version(old, version)
    times = sorted([*undone(old), *(block.time for block in old.blocks[len(new.blocks) :])])
    kept = tuple(time for time in times if time > times[-1] - UNDONE_FOR)[-_MOST_UNDONE:]
    return msgspec.structs.replace(new, lineage=old.lineage + 1, undone=kept or msgspec.UNSET)


def undone(manifest: Manifest) -> tuple[float, ...]:
    """Times of the blocks that rollbacks took away, rising."""
    return () if manifest.undone is msgspec.UNSET else manifest.undone


def replaced(
    old: Manifest, new: Manifest, snapshot: BlobRef | None, archive: Sequence[BlobRef] = ()
) -> Manifest:
    """``new``, begun in the lineage after ``old``'s."""
    return msgspec.structs.replace(begun(new, snapshot, archive), lineage=old.lineage + 1, undone=old.undone)


def forked(
    source: Manifest,
    target: str,
    version: int | None,
    created: float,
    new_name: NewName,
    reseal: Callable[[BlockRecord], BlockRecord],
) -> tuple[Manifest, list[Copy]]:
    """The manifest of a fork, its archive still empty, and the blobs to be made for it of the source's.

    Every blob gets a name of its own: by a name no two lives of a tenant can be confused. ``reseal`` gives a
    source's record with its text sealed for the target. Raises VersionNotKept and what ``reseal`` raises.
    """
    kept = at_version(source, source.version if version is None else version)
    copies: list[Copy] = []

    def copied(blob: BlobRef, of_version: int, kind: str) -> BlobRef:
        copies.append((blob, msgspec.structs.replace(blob, name=new_name(of_version, kind))))
        return copies[-1][1]

    first = kept.snapshot
    fork = msgspec.structs.replace(
        kept,
        tenant=target,
        created=created,
        lineage=0,
        undone=msgspec.UNSET,
        snapshot=first and Snapshot(first.version, copied(first.blob, first.version, "snapshot")),
        blocks=tuple(
            msgspec.structs.replace(reseal(block), blob=copied(block.blob, block.version, "block"))
            for block in kept.blocks
        ),
        archive=(),
    )
    return fork, copies
