"""A few bits flipped in Redis; all of them, and the disk's: ``make torture``."""

from __future__ import annotations

from pathlib import Path

from tests.faults.damage import in_redis
from tests.store.redisserver import RedisServer


def test_no_damage_in_redis_goes_unnoticed(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    try:
        # enough to see that the bench works; ``make torture`` alters every byte
        found = in_redis(server, bits=1, stride=23)
    finally:
        server.stop()
    assert found.unnoticed == []
    assert found.noticed > 50
