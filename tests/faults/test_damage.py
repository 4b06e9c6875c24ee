"""A few bits flipped in Redis; all of them, and the disk's: ``make torture``."""

from __future__ import annotations

from pathlib import Path

from tests.faults import damage
from tests.faults.damage import in_redis
from tests.store.redisserver import RedisServer


def test_no_damage_in_redis_goes_unnoticed(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        flips = damage._flips
        # a bit of every 250th byte is enough to see that the bench works
        damage._flips = lambda data, bits: list(flips(data, 1))[::250]  # type: ignore[assignment]
        try:
            found = in_redis(server)
        finally:
            damage._flips = flips
    finally:
        server.stop()
    assert found.unnoticed == []
    assert found.noticed > 50
