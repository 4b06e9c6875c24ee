"""The parts that a store is made of, as ``app.store.operations`` sees them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from app.errors import TenantQuarantined
from app.store.base import BlobRef, Manifest
from app.store.files import Source
from app.store.lineages import Copy


def quarantined(reason: str, file: str | None = None) -> TenantQuarantined:
    """The error for a tenant of whom something that was stored, under the name ``file``, is damaged."""
    return TenantQuarantined(f"this tenant is in quarantine: {reason}", file=file)


BLOB_NAME = re.compile(r"(\d{10,})-[0-9a-f]{16}\.(?:block|snapshot|archive)")


def require_name(blob: BlobRef) -> None:
    """Raises TenantQuarantined for a name that no store has given: nothing else may become a path or a key."""
    if not BLOB_NAME.fullmatch(blob.name):
        raise quarantined("a blob's name is none that the store has given")


def new_name(version: int, kind: str) -> str:
    """A blob's name, never given before or again; ``kind`` is block, snapshot or archive."""
    return f"{version:010d}-{secrets.token_hex(8)}.{kind}"


class Blobs(Protocol):
    """A tenant's blobs. Errors of the system below are OSErrors or the service's."""

    def new_name(self, version: int, kind: str) -> str:
        """See ``app.store.parts.new_name``."""
        ...

    def put(self, tenant: str, name: str, data: bytes) -> BlobRef:
        """Writes a blob that no manifest names yet; nothing of it is left if that fails."""
        ...

    def put_block(self, tenant: str, version: int, data: bytes) -> BlobRef:
        """As ``put``, of a block and under a name of its choice."""
        ...

    def read(self, tenant: str, blob: BlobRef) -> memoryview:
        """Raises FileNotFoundError, TenantQuarantined, StoreFailed."""
        ...

    def expect(self, tenant: str, blobs: Sequence[BlobRef]) -> None:
        """See ``app.store.base.Store.expect``."""
        ...

    def reader(self, tenant: str, blob: BlobRef) -> Source:
        """The blob's bytes, not checked. Raises FileNotFoundError, now or when it is read; TenantQuarantined,
        StoreFailed."""
        ...

    def discard(self, tenant: str, names: list[str]) -> None:
        """Removes blobs that no manifest names; raises nothing."""
        ...

    def coming(self, name: str) -> AbstractContextManager[None]:
        """Meanwhile the blob is no orphan, though no manifest names it."""
        ...


class Manifests(Protocol):
    """The one thing per tenant that says what is true."""

    def cached(self, tenant: str) -> Manifest | None:
        """The manifest, if it is known to be the newest without asking."""
        ...

    def swap(self, old: Manifest, new: Manifest, fresh: list[BlobRef]) -> Manifest:
        """Replaces ``old`` durably by ``new``, which names the blobs ``fresh`` besides; then removes what only ``old``
        named. Raises StoreFull or StoreFailed."""
        ...


class Place(Protocol):
    """Where a new tenant's blobs are put before its manifest is."""

    def put(self, name: str, data: bytes) -> BlobRef: ...

    def share(self, tenant: str, copy: Copy) -> None:
        """Makes ``tenant``'s blob the new tenant's as well."""
        ...
