"""Manifests, archives and names as bytes: JSON behind a checksum, so that no altered bit goes unnoticed."""

from __future__ import annotations

import base64
import hashlib
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import StoreFailed
from app.store.base import FORMAT, BlockRecord, Manifest

_T = TypeVar("_T")
_NONCE = 12


class Damaged(ValueError):
    """Bytes that are not what was written."""


def checksum(data: bytes) -> str:
    """blake2b, 128 bits, hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal(value: object) -> bytes:
    """JSON of ``value`` behind the checksum of that JSON."""
    body = msgspec.json.encode(value)
    return checksum(body).encode() + b"\n" + body


def unseal(data: bytes, kind: type[_T]) -> _T:
    """The value of type ``kind`` that was sealed. Raises Damaged."""
    mark, newline, body = data[:32], data[32:33], data[33:]
    if newline != b"\n" or mark != checksum(body).encode():
        raise Damaged("the checksum does not match")
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Damaged(str(error)) from error


def unseal_manifest(data: bytes, tenant: str) -> Manifest:
    """Raises Damaged if the bytes are another tenant's manifest, of another format, or inconsistent."""
    manifest = unseal(data, Manifest)
    if manifest.format != FORMAT:
        raise Damaged(f"manifest format {manifest.format} is not known")
    if manifest.tenant != tenant:
        raise Damaged("the manifest belongs to another tenant")
    first = 0 if manifest.snapshot is None else manifest.snapshot.version
    versions = [block.version for block in manifest.blocks]
    if versions != list(range(first + 1, manifest.version + 1)):
        raise Damaged("the manifest's versions have a gap")
    return manifest


class TextCipher:
    """AES-256-GCM of kept texts. Tenant and version are authenticated with each, so none can be moved."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    @staticmethod
    def _context(tenant: str, version: int) -> bytes:
        return f"{version}:{tenant}".encode()

    def encrypt(self, text: str, tenant: str, version: int, nonce: bytes) -> str:
        """``nonce`` is 12 random bytes, never used twice."""
        sealed = self._cipher.encrypt(nonce, text.encode(), self._context(tenant, version))
        return "aes256gcm:" + base64.b64encode(nonce + sealed).decode()

    def decrypt(self, record: BlockRecord, tenant: str) -> BlockRecord:
        """The record with its text readable. Raises StoreFailed for a wrong key."""
        if record.text is None or not record.text.startswith("aes256gcm:"):
            return record
        raw = base64.b64decode(record.text.removeprefix("aes256gcm:"))
        try:
            text = self._cipher.decrypt(raw[:_NONCE], raw[_NONCE:], self._context(tenant, record.version))
        except InvalidTag as error:
            raise StoreFailed("a kept text cannot be decrypted: is this the text key it was written with?") from error
        return msgspec.structs.replace(record, text=text.decode())
