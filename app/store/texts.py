"""The texts of updates as the store keeps them: not at all, plain, or encrypted with the operator's key."""

from __future__ import annotations

import base64
import binascii
import secrets

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from app.errors import StoreFailed
from app.store.base import BlockRecord

_ENCRYPTED = "aes256gcm:"
_PLAIN = "plain:"
_NONCE = 12
_PROOF = b"memoryllm text key"


class Texts:
    """Seals and opens texts: AES-256-GCM, a random 96-bit nonce each.

    Tenant and version are authenticated with a text, so that none can be moved. ``key`` is 32 bytes, or None.
    """

    def __init__(self, keep: bool, key: bytes | None) -> None:
        """Raises ValueError for a key of another length."""
        if key is not None and len(key) != 32:
            raise ValueError(f"a text key is 32 bytes long, this one {len(key)}")
        self.keep = keep
        self._cipher = None if key is None else AESGCM(key)

    @property
    def encrypting(self) -> bool:
        return self._cipher is not None

    @staticmethod
    def _context(tenant: str, version: int) -> bytes:
        return f"{version}:{tenant}".encode()

    def seal(self, text: str | None, tenant: str, version: int) -> str | None:
        """What the store keeps of ``text``, the context of the block that makes ``version``."""
        if text is None or not self.keep:
            return None
        if self._cipher is not None:
            nonce = secrets.token_bytes(_NONCE)
            sealed = self._cipher.encrypt(nonce, text.encode(), self._context(tenant, version))
            return _ENCRYPTED + base64.b64encode(nonce + sealed).decode()
        # a user's own text may begin like an encrypted one
        return _PLAIN + text if text.startswith((_ENCRYPTED, _PLAIN)) else text

    def sealed(self, record: BlockRecord, tenant: str) -> BlockRecord:
        """The record, readable before, as the store keeps it for ``tenant``."""
        return msgspec.structs.replace(record, text=self.seal(record.text, tenant, record.version))

    def open(self, record: BlockRecord, tenant: str) -> BlockRecord:
        """The record with its text readable; without a key an encrypted text is left out.

        Raises StoreFailed if the text cannot be decrypted with this key.
        """
        text = record.text
        if text is None or not text.startswith((_ENCRYPTED, _PLAIN)):
            return record
        if text.startswith(_PLAIN):
            return msgspec.structs.replace(record, text=text.removeprefix(_PLAIN))
        if self._cipher is None:
            return msgspec.structs.replace(record, text=None)
        try:
            raw = base64.b64decode(text.removeprefix(_ENCRYPTED), validate=True)
            opened = self._cipher.decrypt(raw[:_NONCE], raw[_NONCE:], self._context(tenant, record.version))
        except (InvalidTag, binascii.Error, ValueError) as error:
            raise StoreFailed(
                "a kept text cannot be decrypted: is this the text key it was written with?"
            ) from error
        return msgspec.structs.replace(record, text=opened.decode())

    def proof(self) -> str:
        """A token by which ``proves`` recognises the key later. Needs a key."""
        assert self._cipher is not None
        nonce = secrets.token_bytes(_NONCE)
        return (nonce + self._cipher.encrypt(nonce, _PROOF, None)).hex()

    def proves(self, proof: str) -> bool:
        """Whether ``proof`` was made with this key. Needs a key."""
        assert self._cipher is not None
        try:
            raw = bytes.fromhex(proof)
            return self._cipher.decrypt(raw[:_NONCE], raw[_NONCE:], None) == _PROOF
        except (InvalidTag, ValueError):
            return False
