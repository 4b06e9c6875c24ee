"""Stores by URL: ``disk:///absolute/directory``, ``disk://./relative`` or a plain path; ``redis://host:port/db``."""

from __future__ import annotations

from pathlib import Path

from app.store.base import Store
from app.store.disk import DiskStore

REDIS_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "redis+unix", "valkey+unix")


def open_store(
    url: str, *, keep_text: bool = True, text_key: bytes | None = None, history_limit: int = 2000
) -> Store:
    """Opens the store. Raises ValueError for a URL or key it cannot use, StoreFailed if it cannot be opened.

    ``text_key`` is 32 bytes and encrypts kept texts. ``history_limit`` bounds the records kept of a tenant, one a
    context: so far back reach its history, its idempotency keys and the texts that a rebuild needs.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "disk", url
    if scheme in REDIS_SCHEMES:
        # the client takes a while to import, and a disk store does without
        from app.store.redis import RedisStore
        from app.store.redis_server import parse_url

        return RedisStore(parse_url(url), keep_text=keep_text, text_key=text_key, history_limit=history_limit)
    if scheme != "disk":
        raise ValueError(f"unknown store {scheme}://; use disk:///directory or redis://host:port/db")
    if not rest:
        raise ValueError("the store's URL names no directory: disk:///directory")
    if separator and not rest.startswith(("/", ".", "~")):
        raise ValueError("a disk store is disk:///absolute/directory or disk://./relative")
    return DiskStore(
        Path(rest).expanduser(), keep_text=keep_text, text_key=text_key, history_limit=history_limit
    )
