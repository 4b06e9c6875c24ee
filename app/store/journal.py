"""A tenant's journal: the blocks committed since its manifest was written, in a file beside it.

A commit appends its record in place and syncs that one file, where a new manifest would take a file, a rename and
two syncs. The file has its full size from the start, so that a cut is seen, and two halves that hold the same: a
record that a crash has torn is in neither, and one that was durable is still in the other when a half is damaged.
Its name is in the manifest and never given again. As databases do, this trusts a disk not to spoil the bytes beside
those that it was writing when the power failed.
"""

from __future__ import annotations

import re

import msgspec

from app.store import lineages
from app.store.base import BlockRecord, Manifest
from app.store.records import Damaged, checked, seal, unseal

JOURNAL_NAME = re.compile(r"\d{10,}-[0-9a-f]{16}\.journal")
SMALLEST = 1 << 16
LARGEST = 1 << 20
_LENGTH = 4


class Head(msgspec.Struct, frozen=True):
    """What the file ``manifest`` holds. ``journal`` is the name of the file that goes on where it ends, of ``size``
    bytes."""

    manifest: Manifest
    journal: str | None = None
    size: int = 0


class _Entry(msgspec.Struct, frozen=True):
    """``journal`` repeats the file's name: no entry is taken from another file."""

    journal: str
    record: BlockRecord


def size_for(block: int) -> int:
    """Bytes of a journal of blocks of so many bytes: one block's at most, but room for some records."""
    return max(SMALLEST, min(LARGEST, block // 8192 * 8192))


def entry(journal: str, record: BlockRecord) -> bytes:
    sealed = seal(_Entry(journal, record))
    return len(sealed).to_bytes(_LENGTH, "little") + sealed


def unseal_head(data: bytes, tenant: str) -> Head:
    """Raises Damaged, see ``records.checked``. A manifest alone, as stores of format 1 hold it, has no journal."""
    try:
        head = unseal(data, Head)
    except Damaged:
        head = Head(unseal(data, Manifest))
    if head.journal is not None and not JOURNAL_NAME.fullmatch(head.journal):
        raise Damaged("the journal's name is none that the store has given")
    return Head(checked(head.manifest, tenant), head.journal, head.size)


def replayed(head: Head, data: bytes) -> tuple[Manifest, int, bool]:
    """The manifest with the journal's records, the offset behind them in each half, and whether both halves hold
    them all. Raises Damaged."""
    assert head.journal is not None
    half = len(data) // 2
    manifest, offset, whole = head.manifest, 0, True
    while True:
        found = [_entry_at(data[start : start + half], offset, head.journal, manifest) for start in (0, half)]
        one = found[0] or found[1]
        if one is None:
            return manifest, offset, whole
        whole = whole and found[0] == found[1]
        record, offset = one
        manifest = lineages.committed(manifest, record)


def _entry_at(half: bytes, offset: int, journal: str, manifest: Manifest) -> tuple[BlockRecord, int] | None:
    """The record there and the offset behind it; None where no whole one is. Raises Damaged for one that does not
    follow ``manifest``, or is of another journal."""
    begin = offset + _LENGTH
    end = begin + int.from_bytes(half[offset:begin], "little")
    try:
        found = unseal(half[begin:end], _Entry)
    except Damaged:
        return None
    if found.journal != journal or found.record.version != manifest.version + 1:
        raise Damaged("the journal has a record of something else")
    return found.record, end
