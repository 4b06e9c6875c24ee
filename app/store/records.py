"""Manifests, archives and names as bytes: JSON behind a checksum, so that no altered bit goes unnoticed."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import msgspec
import xxhash

from app.store.base import FORMAT, Manifest
from app.store.lineages import oldest

_T = TypeVar("_T")
_BLOB = "xxh3:"


class Damaged(ValueError):
    """Bytes that are not what was written."""


def checksum(data: bytes | memoryview) -> str:
    """blake2b, 128 bits, hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class BlobSum:
    """Checksums a blob as it comes by: XXH3 of 128 bits, since a disk reads faster than a cryptographic hash computes.

    ``like`` is the checksum it will be compared with; those of stores from before are blake2b.
    """

    def __init__(self, like: str = _BLOB) -> None:
        self._new = like.startswith(_BLOB)
        self._state = xxhash.xxh3_128() if self._new else hashlib.blake2b(digest_size=16)

    def update(self, data: bytes | memoryview) -> None:
        self._state.update(data)

    def text(self) -> str:
        return (_BLOB if self._new else "") + self._state.hexdigest()


def blob_checksum(data: bytes | memoryview, like: str = _BLOB) -> str:
    found = BlobSum(like)
    found.update(data)
    return found.text()


def seal(value: object) -> bytes:
    """JSON of ``value`` behind the checksum of that JSON."""
    body = msgspec.json.encode(value)
    return checksum(body).encode() + b"\n" + body


def unseal(data: bytes | memoryview, kind: type[_T]) -> _T:
    """The value of type ``kind`` that was sealed. Raises Damaged."""
    mark, newline, body = data[:32], data[32:33], data[33:]
    if newline != b"\n" or mark != checksum(body).encode():
        raise Damaged("the checksum does not match")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Damaged(str(error)) from error


def unseal_manifest(data: bytes, tenant: str) -> Manifest:
    """Raises Damaged, see ``checked``."""
    return checked(unseal(data, Manifest), tenant)


def checked(manifest: Manifest, tenant: str) -> Manifest:
    """Raises Damaged if the manifest is another tenant's, of another format, or inconsistent."""
    if manifest.format != FORMAT:
        raise Damaged(f"manifest format {manifest.format} is not known")
    if manifest.tenant != tenant:
        raise Damaged("the manifest belongs to another tenant")
    versions = [block.version for block in manifest.blocks]
    first = oldest(manifest)
    if first > manifest.version or versions != list(range(first + 1, manifest.version + 1)):
        raise Damaged("the manifest's versions have a gap")
    return manifest
