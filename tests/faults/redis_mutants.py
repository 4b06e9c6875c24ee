"""Seeded bugs of the Redis store, each of which breaking its connections must find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import app.store.redis_leases
import app.store.redis_manifests
from app.errors import StoreFailed
from app.store.base import Manifest
from app.store.redis_blobs import RedisBlobs
from app.store.redis_manifests import RedisManifests
from tests.faults.cuts import Cutting
from tests.faults.ledger import Violation

CYCLES = 400


def _no_fence() -> Any:
    """Whoever is late writes all the same."""
    source = app.store.redis_manifests.SWAP.replace("~= ARGV[1]", "== ''")
    assert source != app.store.redis_manifests.SWAP
    return mock.patch.object(app.store.redis_manifests, "SWAP", source)


def _old_number() -> Any:
    """A claim that is taken again after a failure keeps its number."""
    source = app.store.redis_leases.CLAIM.replace("if not lease or ARGV[4] == '1' then", "if not lease then")
    assert source != app.store.redis_leases.CLAIM
    return mock.patch.object(app.store.redis_leases, "CLAIM", source)


def _acknowledged_all_the_same() -> Any:
    """A manifest whose writing failed is taken for written."""
    put = RedisManifests._put

    def careless(self: RedisManifests, tenant: str, mark: str, manifest: Manifest) -> None:
        try:
            put(self, tenant, mark, manifest)
        except StoreFailed:
            return

    return mock.patch.object(RedisManifests, "_put", careless)


def _shared_blobs() -> Any:
    """All tenants' blobs lie under the same keys."""

    def same(self: RedisBlobs, tenant: str, name: str, number: int) -> str:
        return f"blob:{name.partition('-')[0]}"

    return mock.patch.object(RedisBlobs, "_chunk", same)


MUTANTS: dict[str, Callable[[], Any]] = {
    "no fence": _no_fence,
    "a claim keeps its number": _old_number,
    "acknowledged all the same": _acknowledged_all_the_same,
    "tenants share their blobs": _shared_blobs,
}


def caught(name: str, folder: Path) -> bool:
    """Whether the cuts find it."""
    late = 1.0 if name in ("no fence", "a claim keeps its number") else 0.0
    with MUTANTS[name]():
        cutting = Cutting(folder, seed=5, kills=0.0, stalls=late, timeout=0.1)
        try:
            cutting.run(CYCLES, lambda _: None)
        except Violation:
            return True
        finally:
            cutting.close()
    return False
