"""Bytes of a small store are altered, and files cut between them: noticed or harmless, never believed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from app.errors import TenantQuarantined
from app.store.base import Manifest
from app.store.disk import DiskStore
from app.store.journal import Head
from app.store.records import checksum, seal, unseal
from tests.faults.damage import everything, on_disk, small_store, with_file
from tests.store.memorydisk import MemoryDisk


def test_every_altered_byte_is_noticed_or_harmless_and_touches_one_tenant(tmp_path: Path) -> None:
    """One bit of every third byte; ``make torture`` flips all eight of each."""
    found = on_disk(tmp_path, bits=1, stride=3)
    assert found.unnoticed == []
    assert found.noticed > 700
    assert found.harmless > 20


def test_a_quarantined_tenant_can_be_erased_and_made_anew(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    for path, leaf in disk.leaves():
        if path.name == "manifest":
            leaf.now[40] ^= 1
    store = DiskStore(tmp_path, files=disk)
    assert list(store.tenants()) == ["ada", "bob"]
    with pytest.raises(TenantQuarantined, match="in quarantine: its manifest is damaged"):
        store.load("ada")
    with pytest.raises(TenantQuarantined):
        store.commit("ada", 3, b"x", time=0.0, tokens=16)
    receipt = store.erase("ada")
    assert receipt is not None
    # read off the blobs' names, since the manifest is not to be believed
    assert (receipt.version, receipt.blobs) == (3, 3)
    assert store.load("ada") is None
    store.create(Manifest("ada", 8, "f", 0.0))
    assert list(store.tenants()) == ["ada", "bob"]
    store.close()


def test_nothing_of_a_quarantined_tenant_is_swept(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    for path, leaf in disk.leaves():
        if path.name == "manifest":
            leaf.now[40] ^= 1
    before = [path for path, _ in disk.leaves()]
    store = DiskStore(tmp_path, files=disk)
    for tenant in ("ada", "bob"):
        with pytest.raises(TenantQuarantined):
            store.load(tenant)
    store.close()
    assert [path for path, _ in disk.leaves()] == before


def test_files_of_another_tenant_or_another_version_are_noticed(tmp_path: Path) -> None:
    """Intact files in the wrong place: a manifest or blob restored from a backup of something else."""
    disk = small_store(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    ada, bob = (store._home.directory(tenant) for tenant in ("ada", "bob"))
    store.close()
    blocks = {path.parent: path for path, _ in disk.leaves() if path.suffix == ".block"}
    for target, source, said in (
        (ada / "manifest", bob / "manifest", "belongs to another tenant"),
        (blocks[ada], blocks[bob], "a blob is damaged"),
    ):
        changed = with_file(disk, target, disk.read(source))
        store = DiskStore(tmp_path, files=changed)
        everything(store, "bob")
        with pytest.raises(TenantQuarantined, match=said):
            everything(store, "ada")
        store.close()


def test_a_name_that_is_another_tenant_s_is_not_believed(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    ada, bob = (store._home.directory(tenant) for tenant in ("ada", "bob"))
    store.close()
    store = DiskStore(tmp_path, files=with_file(disk, ada / "name", disk.read(bob / "name")))
    assert list(store.tenants()) == ["ada", "bob"]
    store.close()


@pytest.mark.parametrize("tenant", ["ada", 'a "quoted" \\ name', "🙂"])
@pytest.mark.parametrize("part", ["checksum", "end"])
def test_a_tenant_whose_name_and_manifest_are_both_damaged_is_still_listed(
    tmp_path: Path, tenant: str, part: str
) -> None:
    disk = MemoryDisk(tmp_path)
    store = DiskStore(tmp_path, files=disk)
    store.create(Manifest(tenant, 7, "f", 0.0))
    store.close()
    for path, leaf in disk.leaves():
        if path.name == "manifest":
            leaf.now[10 if part == "checksum" else -1] ^= 1
        elif path.name == "name":
            # what is left of the name proves nothing, or there is nothing of it
            leaf.now = leaf.now[:33] if part == "end" else bytearray(b"x" * 32) + leaf.now[32:]
    store = DiskStore(tmp_path, files=disk)
    assert list(store.tenants()) == [tenant]
    with pytest.raises(TenantQuarantined):
        store.load(tenant)
    assert store.erase(tenant) is not None
    assert list(store.tenants()) == []
    store.close()


def test_a_tenant_whose_name_is_nowhere_intact_is_still_reached_by_name(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    for path, leaf in disk.leaves():
        if path.name in {"manifest", "name"}:
            leaf.now = bytearray(leaf.now.replace(b"ada", b"eve"))
    store = DiskStore(tmp_path, files=disk)
    # neither listed under a name that is not its own
    assert list(store.tenants()) == ["bob"]
    with pytest.raises(TenantQuarantined):
        store.load("ada")
    assert store.erase("ada") is not None
    assert store.load("ada") is None
    store.close()


def test_a_manifest_of_before_there_were_lineages_is_read(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    for path, leaf in disk.leaves():
        if path.name == "manifest":
            body = msgspec.json.encode(unseal(bytes(leaf.now), Head).manifest)
            assert b',"lineage":0' in body
            older = body.replace(b',"lineage":0', b"")
            leaf.now = bytearray(checksum(older).encode() + b"\n" + older)
    store = DiskStore(tmp_path, files=disk)
    manifest = store.load("ada")
    assert manifest is not None
    # the third block was in the journal
    assert (manifest.version, manifest.lineage) == (2, 0)
    assert store.rollback("ada", 2, expected_version=2).lineage == 1
    store.close()


def test_a_snapshot_of_a_version_still_to_come_is_not_believed(tmp_path: Path) -> None:
    disk = small_store(tmp_path)
    for path, leaf in disk.leaves():
        if path.name == "manifest":
            manifest = unseal(bytes(leaf.now), Head).manifest
            leaf.now = bytearray(seal(Head(msgspec.structs.replace(manifest, version=1, blocks=()))))
    store = DiskStore(tmp_path, files=disk)
    with pytest.raises(TenantQuarantined):
        store.load("ada")
    store.close()
