"""A cold memory of few blocks is grown on the checkpoint's own pool: as if all of it had been read and projected."""

from __future__ import annotations

import pytest
import torch

from app.errors import VersionConflict
from app.memory import loader as loading
from app.memory.arena import Arena, Memory
from app.memory.codec import Pool, encode_snapshot
from app.memory.lanes import HostLanes, lanes_of
from app.memory.loader import Loaded, Loader
from app.memory.source import Source
from app.model.backbone import Backbone
from app.store.base import BlobRef, Manifest
from tests.fakes import MemoryStore
from tests.harness import Harness, load_backbone

TEXT = list(range(3, 35))


@pytest.fixture(scope="module", params=["plain", "two-adapters", "uninitialized"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return load_backbone(request.param)[0]


def taught(backbone: Backbone, updates: int) -> MemoryStore:
    store = MemoryStore()
    harness = Harness(backbone, store=store, compacted_after=100)
    for number in range(updates):
        harness.update("ada", [token + number for token in TEXT])
    return store


def load(backbone: Backbone, store: MemoryStore) -> tuple[Loaded, Arena]:
    """Into a slot that somebody else's memory was in."""
    arena, lanes = Arena(backbone, 2, 2), lanes_of(backbone.device, backbone.dtype)
    loader = Loader(arena, Source(backbone, store, "test"), lanes)
    for part in arena.pools.parts(1):
        part.fill_(7)
    return loader.load("ada", 1, lanes.mark(), None, None), arena


def in_order(memory: Memory, arena: Arena) -> list[torch.Tensor]:
    """K and V by rank, layer by layer."""
    spare = int((memory.view.rank[0] < 0).sum())
    found = []
    for whole in arena.pools.whole(memory.slot, torch.float32):
        assert whole.isfinite().all()
        found += [w[:, rank.argsort()[spare:]] for w, rank in zip(whole, memory.view.rank, strict=True)]
    return found


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_it_has_the_bits_that_it_has_when_all_of_it_is_projected(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, updates: int
) -> None:
    monkeypatch.setattr(loading, "_FEW", 1)
    store = taught(backbone, updates)
    found, arena = load(backbone, store)
    monkeypatch.setattr(Loader, "_regrown", lambda *_: None)
    expected, other = load(backbone, store)
    pairs = zip(in_order(found.memory, arena), in_order(expected.memory, other), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    for name in ("tenant", "seed", "slot", "version", "content", "pins", "owed"):
        assert getattr(found.memory, name) == getattr(expected.memory, name), name
    assert found.memory.version == found.memory.view.version == updates
    assert torch.equal(found.memory.born, expected.memory.born)
    assert found.memory.tail is not None
    assert expected.memory.tail is not None
    assert torch.equal(found.memory.tail, expected.memory.tail)
    assert (found.tier, found.moved > 0) == ("cold", True)


@pytest.mark.parametrize("updates", [1, 2])
def test_only_few_blocks_are_published_one_by_one(
    monkeypatch: pytest.MonkeyPatch, backbone: Backbone, updates: int
) -> None:
    """Of a pool of six blocks one; and none where there is no pool to begin with."""
    store, ways = taught(backbone, updates), []
    whole = Source.settled_pool

    def noted(source: Source, manifest: Manifest) -> tuple[Manifest, Pool]:
        ways.append("whole")
        return whole(source, manifest)

    monkeypatch.setattr(Source, "settled_pool", noted)
    load(backbone, store)
    assert ways == ([] if updates == 1 and backbone.weights.initialized else ["whole"])


def test_a_copy_costs_what_its_host_memory_takes(backbone: Backbone) -> None:
    class Generous(HostLanes):
        """Gives more than was asked for, as memory is pinned."""

        def host_bytes(self, size: int) -> int:
            return 1 << size.bit_length()

    arena = Arena(backbone, 2, 2)
    loader = Loader(arena, Source(backbone, MemoryStore(), "test"), Generous(backbone.dtype))
    buffers = loader.buffers()
    sizes = [part.nbytes for part in (*buffers.parts, buffers.tail)]
    assert sum(sizes) == Arena.bytes_per_pool(backbone)
    assert loader.bytes_per_copy == sum(1 << size.bit_length() for size in sizes) > sum(sizes)


def test_a_compaction_meanwhile_is_read_instead(backbone: Backbone) -> None:
    class Compacting(MemoryStore):
        """Compacts when the first blob is asked for."""

        def read(self, tenant: str, blob: BlobRef) -> bytes:
            manifest = self.manifests[tenant]
            if manifest.snapshot is None:
                super().compact(tenant, manifest.version, snapshot)
                raise VersionConflict("the blob was compacted away")
            return super().read(tenant, blob)

    plain, store = taught(backbone, 1), Compacting()
    store.manifests, store.blobs = dict(plain.manifests), dict(plain.blobs)
    snapshot = encode_snapshot(Source(backbone, plain, "test").pool(plain.manifests["ada"]))
    found, arena = load(backbone, store)
    expected, other = load(backbone, plain)
    pairs = zip(in_order(found.memory, arena), in_order(expected.memory, other), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert found.memory.content == expected.memory.content
