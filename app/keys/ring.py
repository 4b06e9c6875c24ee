"""API keys: 256 random bits each, of which a server keeps the hash alone.

A key is ``mllm-<id>-<secret>``. The id says which entry is meant and is no secret; the secret's hash is compared in
constant time. Secrets are drawn whole from the system's randomness, so that one round of SHA-256 is enough: there is
no dictionary to try them from, unlike passwords.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Iterable

import msgspec

_KEY = re.compile(r"mllm-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
# what an unknown id is compared with, so that it takes as long as a known one
_NOBODY = "0" * 64


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one tenant may use; 0: no limit. ``updates_per_day`` counts contexts, each of which writes a block.

    ``weight`` is its share of a busy server beside others of weight 1 (0: as if 1).
    """

    updates_per_day: int = 0
    bytes: int = 0
    concurrent: int = 0
    weight: int = 0

    def over(self, base: Limits) -> Limits:
        """These limits, and ``base``'s where there is none."""
        return Limits(
            self.updates_per_day or base.updates_per_day,
            self.bytes or base.bytes,
            self.concurrent or base.concurrent,
            self.weight or base.weight,
        )


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of the keys file. ``tenants`` are names, or prefixes that end in ``*``; an admin's may be any."""

    id: str
    digest: str
    created: float
    name: str = ""
    tenants: tuple[str, ...] = ()
    admin: bool = False
    limits: Limits = Limits()

    def may(self, tenant: str) -> bool:
        """Whether the key is for this tenant."""
        return self.admin or any(_matches(bound, tenant) for bound in self.tenants)

    @property
    def own(self) -> str | None:
        """The one tenant that the key is for, if there is one and no more."""
        if self.admin or len(self.tenants) != 1 or self.tenants[0].endswith("*"):
            return None
        return self.tenants[0]


def _matches(bound: str, tenant: str) -> bool:
    return tenant.startswith(bound[:-1]) if bound.endswith("*") else tenant == bound


def digest(secret: str) -> str:
    """SHA-256, hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


def make(
    *, name: str = "", tenants: Iterable[str] = (), admin: bool = False, limits: Limits | None = None
) -> tuple[str, Key]:
    """A new key as its owner gets it, this once, and its entry."""
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    entry = Key(id, digest(secret), time.time(), name, tuple(tenants), admin, limits or Limits())
    return f"mllm-{id}-{secret}", entry


class Ring:
    """The keys that a server knows."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = tuple(keys)
        self._by_id = {key.id: key for key in self.keys}

    def find(self, presented: str) -> Key | None:
        """The entry of a key, or None: unknown, revoked, or no key at all."""
        match = _KEY.fullmatch(presented)
        if match is None:
            return None
        entry = self._by_id.get(match[1])
        same = hmac.compare_digest(digest(match[2]), entry.digest if entry is not None else _NOBODY)
        return entry if same else None
