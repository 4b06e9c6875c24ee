"""Stores by URL: ``disk:///absolute/directory``, ``disk://./relative`` or a plain path."""

from __future__ import annotations

from pathlib import Path

from app.store.base import Store
from app.store.disk import DiskStore


def open_store(url: str, *, keep_text: bool = True, text_key: bytes | None = None) -> Store:
    """Opens the store. Raises ValueError for an unknown scheme, StoreFailed if it cannot be opened."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "disk", url
    if scheme == "disk":
        if not rest:
            raise ValueError("the store's URL names no directory: disk:///directory")
        return DiskStore(Path(rest).expanduser(), keep_text=keep_text, text_key=text_key)
    if scheme in ("redis", "rediss", "valkey"):
        raise ValueError("this version has no Redis store yet; use disk:///directory")
    raise ValueError(f"unknown store {scheme}://; use disk:///directory")
