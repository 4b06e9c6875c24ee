"""A full disk, a real one: a small tmpfs where mounting is allowed, and a limit of file sizes anywhere.

Updates are refused with StoreFull and change nothing, reading goes on, and when there is room again so do updates.
"""

from __future__ import annotations

import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import StoreFull
from app.store.base import Manifest
from app.store.disk import DiskStore

_BLOCK = 64 * 1024


class Lost(AssertionError):
    """Something was lost, or was acknowledged that is not there."""


@contextmanager
def small_disk(folder: Path, size: str = "2m") -> Iterator[None]:
    """Mounts a tmpfs of ``size`` on ``folder``. Raises PermissionError where that is not allowed."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        raise PermissionError("this process may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], capture_output=True, check=True)


def grow(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], capture_output=True, check=True)


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may be larger than ``limit`` bytes: as a quota does, it says EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def _commit(store: DiskStore, tenant: str, version: int, size: int = _BLOCK) -> None:
    data = tenant.encode() * (size // len(tenant))
    store.commit(tenant, version, data, time=0.0, tokens=16, text="words")


def check(store: DiskStore, versions: dict[str, int]) -> None:
    """Raises Lost unless every acknowledged block of every tenant is there and readable."""
    for tenant, version in versions.items():
        manifest = store.load(tenant)
        if manifest is None or manifest.version != version:
            raise Lost(f"{tenant} is not at version {version}")
        for block in manifest.blocks:
            if not bytes(store.read(tenant, block.blob)).startswith(tenant.encode()):
                raise Lost(f"a block of {tenant} is another's")


def fill(root: Path) -> int:
    """Updates two tenants on a disk that fills up, whatever they try, until nothing fits; then makes room by erasing
    a third. Returns how many updates were refused. Raises Lost."""
    store = DiskStore(root)
    for tenant in ("ada", "bob", "carol"):
        store.create(Manifest(tenant, 1, "f", 0.0))
    versions = {"ada": 0, "bob": 0, "carol": 0}
    for _ in range(4):
        _commit(store, "carol", versions["carol"])
        versions["carol"] += 1
    refused = 0
    while refused < 20:
        for tenant in ("ada", "bob"):
            try:
                _commit(store, tenant, versions[tenant], _BLOCK >> (refused // 4))
                versions[tenant] += 1
            except StoreFull:
                refused += 1
            check(store, versions)
    store.close()
    store = DiskStore(root)
    check(store, versions)
    if store.erase("carol") is None:
        raise Lost("carol is gone by herself")
    del versions["carol"]
    for tenant in versions:
        _commit(store, tenant, versions[tenant])
        versions[tenant] += 1
    check(store, versions)
    store.close()
    return refused


def limited(root: Path) -> int:
    """Updates too large for a file between others that are not. Returns how many were refused. Raises Lost."""
    store = DiskStore(root)
    store.create(Manifest("ada", 1, "f", 0.0))
    versions = {"ada": 0}
    refused = 0
    for turn in range(12):
        with small_files(32 * 1024):
            try:
                _commit(store, "ada", versions["ada"], 40_000 if turn % 2 else 1000)
                versions["ada"] += 1
            except StoreFull:
                refused += 1
            check(store, versions)
    _commit(store, "ada", versions["ada"], 40_000)
    versions["ada"] += 1
    store.close()
    check(DiskStore(root), versions)
    return refused
