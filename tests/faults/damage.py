"""Damage to a small store: every bit flipped, every file and key cut at every length. Noticed, or without effect.

A change is noticed when the store does not open, or its tenant is in quarantine; never is something else believed, and
never is another tenant touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from app.errors import StoreFailed, TenantQuarantined
from app.store import journal
from app.store.base import Idempotency, Manifest, Store
from app.store.disk import DiskStore
from app.store.home import tenant_id
from app.store.redis import RedisStore
from app.store.redis_server import parse_url
from tests.store.memorydisk import Folder, Leaf, MemoryDisk
from tests.store.redisserver import RedisServer

TENANTS = ("ada", "bob")


@dataclass
class Damage:
    """What became of the changes; ``unnoticed`` names those that were believed or touched somebody else."""

    noticed: int = 0
    harmless: int = 0
    unnoticed: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.noticed + self.harmless + len(self.unnoticed)


def small_store(root: Path) -> MemoryDisk:
    disk = MemoryDisk(root)
    store = DiskStore(root, files=disk)
    fill(store)
    store.close()
    return disk


def fill(store: Store) -> None:
    """Two tenants, each with a snapshot, an archive and a block."""
    for tenant in ("ada", "bob"):
        store.create(Manifest(tenant, 7, "f", 0.0))
        for version in range(3):
            mark = Idempotency(f"k{version}", 0, 1, "d")
            data = f"{tenant} {version}".encode()
            store.commit(tenant, version, data, time=0.0, tokens=16, text="words", idempotency=mark)
            if version == 1:
                store.compact(tenant, 2, f"{tenant} pool".encode())


def everything(store: Store, tenant: str) -> list[Any]:
    manifest = store.load(tenant)
    assert manifest is not None
    assert manifest.snapshot is not None
    refs = [manifest.snapshot.blob, *(block.blob for block in manifest.blocks)]
    found = [store.find(tenant, f"k{version}") for version in range(4)]
    poured = bytearray()
    with store.reader(tenant, manifest.snapshot.blob) as reader:
        reader.pour(poured.extend)
    return [manifest, [store.read(tenant, ref) for ref in refs], poured, store.history(tenant), found]


def everything_or_quarantine(store: Store, tenant: str) -> list[Any] | None:
    try:
        return everything(store, tenant)
    except TenantQuarantined:
        return None


def copy(folder: Folder) -> Folder:
    return folder.after_crash("all")


def altered(disk: MemoryDisk, bits: int, stride: int) -> Iterator[tuple[Path, str, MemoryDisk]]:
    """The disk with ``bits`` bits of each ``stride``-th byte flipped in turn, and each file cut there, grown and
    removed."""
    for path, leaf in disk.leaves():
        original = bytes(leaf.now)
        changes = dict(_changes(original, bits, stride))
        changes |= {"grown": original + b"\0", "doubled": original * 2}
        for what, data in changes.items():
            yield path, what, with_file(disk, path, data)
        yield path, "removed", with_file(disk, path, None)


def _changes(data: bytes, bits: int, stride: int) -> Iterator[tuple[str, bytes]]:
    for n in range(0, len(data), stride):
        for k in range(bits):
            bit = (n + k) % 8
            yield f"bit {bit} of byte {n}", data[:n] + bytes([data[n] ^ 1 << bit]) + data[n + 1 :]
        yield f"cut to {n}", data[:n]


def with_file(disk: MemoryDisk, path: Path, data: bytes | None) -> MemoryDisk:
    changed = MemoryDisk(disk.root, copy(disk.folder))
    folder = changed._folder(path.parent)
    if data is None:
        del folder.now[path.name]
    else:
        folder.now[path.name] = Leaf(data, data)
    return changed


def on_disk(
    root: Path, *, bits: int = 8, stride: int = 1, progress: Callable[[str], None] = lambda _: None
) -> Damage:
    """Every change of the files of a small disk store. ``name`` repeats what the directory's id proves."""
    with mock.patch.object(journal, "SMALLEST", 2048):
        disk, done = small_store(root), Damage()
    store = DiskStore(root, files=MemoryDisk(root, copy(disk.folder)))
    intact = {tenant: everything(store, tenant) for tenant in TENANTS}
    empty = {path for path, leaf in disk.leaves() if not leaf.now}
    owners = {store._home.directory(tenant): tenant for tenant in intact}
    store.close()
    for path, what, changed in altered(disk, bits, stride):
        progress(f"{done.tried:,} changes")
        where = f"{path.name}, {what}"
        try:
            store = DiskStore(root, files=changed)
        except StoreFailed:
            _count(done, path.name == "FORMAT", where)
            continue
        listed = list(store.tenants()) == list(TENANTS)
        owner = owners.get(path.parent)
        found = {tenant: everything_or_quarantine(store, tenant) for tenant in TENANTS}
        store.close()
        others = all(found[tenant] == intact[tenant] for tenant in TENANTS if tenant != owner)
        if not listed or not others or owner is None:
            done.unnoticed.append(where)
        elif found[owner] is None:
            done.noticed += 1
        elif (path.name.endswith(("name", ".journal")) or path in empty) and found[owner] == intact[owner]:
            # a name is proved by its directory, a journal holds everything twice, and a file made ahead nothing
            done.harmless += 1
        else:
            done.unnoticed.append(where)
    return done


def _count(done: Damage, noticed: bool, where: str) -> None:
    if noticed:
        done.noticed += 1
    else:
        done.unnoticed.append(where)


def in_redis(
    server: RedisServer,
    *,
    bits: int = 8,
    stride: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> Damage:
    """Every change of the strings of one of two tenants in Redis: its manifest and its blobs."""
    done = Damage()
    store = RedisStore(parse_url(server.url))
    fill(store)
    intact = {tenant: everything(store, tenant) for tenant in TENANTS}
    store.close()
    with server.client() as client:
        mine = tenant_id("ada").encode()
        keys = [k for k in client.keys("*") if mine in k and (b":blob:" in k or k.endswith(b":manifest"))]
        for key in sorted(keys):
            original = client.get(key)
            assert isinstance(original, bytes)
            changes = _changes(original, bits, stride)
            for what, data in [*changes, ("grown", original + b"\0"), ("removed", None)]:
                progress(f"{done.tried:,} changes")
                client.set(key, data) if data is not None else client.delete(key)
                store = RedisStore(parse_url(server.url))
                found = {tenant: everything_or_quarantine(store, tenant) for tenant in TENANTS}
                listed = list(store.tenants()) == list(TENANTS)
                store.close()
                noticed = listed and found["ada"] is None and found["bob"] == intact["bob"]
                _count(done, noticed, f"{key.decode()}, {what}")
            client.set(key, original)
    return done
