"""A stored pool layer by layer: the same as all at once, in little memory, and no altered byte goes unnoticed."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest
import torch

from app.errors import TenantQuarantined, VersionConflict
from app.memory.codec import Block, Pool, encode_block, encode_snapshot
from app.memory.replay import replay
from app.memory.stored import StoredPool
from app.model.forgetting import draw
from app.store.base import Manifest, Store
from app.store.disk import DiskStore
from tests.fakes import MemoryStore


class Memory:
    """A tenant in ``store`` whose pool has ``layers`` of ``size`` tokens; ``blocks`` are all that were committed."""

    def __init__(
        self,
        store: Store,
        *,
        layers: int = 3,
        size: int = 20,
        count: int = 4,
        width: int = 6,
        per_layer: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.store, self.per_layer, self.dtype = store, per_layer, dtype
        self.layers, self.size, self.count, self.width = layers, size, count, width
        rows = layers if per_layer else 1
        self.own = Pool(self.randn(0, size), torch.zeros(rows, size, dtype=torch.int32))
        self.blocks: list[tuple[int, Block]] = []
        self.manifest = store.create(Manifest("ada", 7, "f", 1.0))

    def randn(self, seed: int, rows: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.layers, rows, self.width, generator=generator).to(self.dtype)

    def update(self, *, fills: bool = False) -> None:
        version = self.manifest.version + 1
        forgotten = draw(
            7,
            version,
            pool_size=self.size,
            num_tokens=self.count,
            num_layers=self.layers,
            per_layer=self.per_layer,
        )
        block = Block(self.randn(version, self.count), None if fills else forgotten)
        self.blocks.append((version, block))
        self.manifest = self.store.commit("ada", version - 1, encode_block(block), time=0.0, tokens=20)

    def compact(self) -> None:
        snapshot = encode_snapshot(replay(self.own, self.blocks))
        self.manifest = self.store.compact("ada", self.manifest.version, snapshot)

    def stored(self) -> StoredPool:
        return StoredPool(self.store, self.manifest, self.own)


def read(memory: Memory) -> Pool:
    with memory.stored() as stored:
        layers = [layer.clone() for layer in stored.layers()]
        pool = Pool(torch.stack(layers), stored.born)
        assert (stored.shape, stored.dtype) == (tuple(pool.hidden.shape), pool.hidden.dtype)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("fills", [False, True])
@pytest.mark.parametrize("snapshot", [None, 0, 1, 3])
def test_layer_by_layer_is_all_at_once(
    dtype: torch.dtype, per_layer: bool, fills: bool, snapshot: int | None
) -> None:
    """``snapshot``: so many updates after it; None: there is none."""
    memory = Memory(MemoryStore(), per_layer=per_layer, dtype=dtype)
    assert torch.equal(read(memory).hidden, memory.own.hidden)
    for number in range(4):
        memory.update(fills=fills and not number)
    if snapshot is not None:
        memory.compact()
    for _ in range(snapshot or 0):
        memory.update()
    expected, found = replay(memory.own, memory.blocks), read(memory)
    assert torch.equal(found.hidden, expected.hidden)
    assert torch.equal(found.born, expected.born)


def test_no_altered_byte_goes_unnoticed(tmp_path: Path) -> None:
    """Wherever it is: headers, which are read before anything is checked, above all."""
    store = DiskStore(tmp_path)
    memory = Memory(store, width=1, size=8, count=2)
    for _ in range(2):
        memory.update()
    memory.compact()
    memory.update()
    files = [
        *tmp_path.rglob("*.snapshot"),
        *(path for path in tmp_path.rglob("*.block") if path.stat().st_size),
    ]
    assert len(files) == 2
    rng = random.Random(1)
    for path in files:
        sound = path.read_bytes()
        damaged = [
            sound[:at] + bytes([sound[at] ^ 1 << rng.randrange(8)]) + sound[at + 1 :]
            for at in range(len(sound))
        ]
        damaged += [sound[:at] for at in range(len(sound))] + [sound + b"\0"]
        for data in damaged:
            path.write_bytes(data)
            with pytest.raises(TenantQuarantined):
                read(memory)
        path.write_bytes(sound)
    read(memory)
    store.close()


def test_what_was_read_ahead_must_come_again() -> None:
    """A disk that gives other bytes the second time: what was believed unchecked is not what was checked."""

    class Flickering(MemoryStore):
        def reader(self, tenant, blob):  # type: ignore[no-untyped-def]
            reader = super().reader(tenant, blob)
            peek = reader.peek

            def other(offset: int, size: int) -> memoryview:
                data = bytearray(peek(offset, size))
                # what lies before the block or behind it, and not the header by itself
                if len(data) > 8 and offset != 8:
                    data[-4] ^= 1
                return memoryview(data)

            reader.peek = other
            return reader

    memory = Memory(Flickering())
    memory.update()
    with pytest.raises(TenantQuarantined):
        read(memory)


def test_a_blob_that_compaction_took_is_a_conflict() -> None:
    memory = Memory(MemoryStore())
    memory.update()
    before = memory.manifest
    memory.compact()
    with pytest.raises(VersionConflict):
        StoredPool(memory.store, before, memory.own)


def test_two_pools_in_the_store_take_a_few_layers_of_memory(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    memory = Memory(store, layers=24, size=200, count=20, width=256)
    for _ in range(2):
        memory.update()
    memory.compact()
    for _ in range(9):
        memory.update()
    layer = 200 * 256 * 4
    peaks = []
    for read_all in (False, True):
        tracemalloc.start()
        with memory.stored() as stored:
            for _ in stored.layers():
                pass
        if read_all:
            held = [store.read("ada", blob) for blob in [memory.manifest.snapshot.blob]]  # type: ignore[union-attr]
            del held
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # the snapshot's layer, those of all blocks, what is read ahead of each, and the ones before not yet gone
    assert peaks[0] < 6 * layer
    assert peaks[1] > 20 * layer, "the memory of blobs is not seen here"
    store.close()
