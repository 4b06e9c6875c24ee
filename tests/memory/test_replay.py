"""Replaying blocks, on a pool and on a snapshot as it is read, against forgetting step by step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from app.errors import FingerprintMismatch
from app.memory import replay as replaying
from app.memory.codec import Block, Pool, encode_snapshot
from app.memory.replay import Gathering, replay
from app.model.forgetting import draw, forget

LAYERS, SIZE, COUNT, WIDTH = 3, 20, 4, 6
SHAPE = (LAYERS, SIZE, WIDTH)
Blocks = list[tuple[int, Block]]


def base(rows: int, dtype: torch.dtype = torch.float32) -> Pool:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(SHAPE, generator=generator).to(dtype)
    return Pool(hidden, torch.arange(rows * SIZE, dtype=torch.int32).view(rows, SIZE))


def grown(pool: Pool, updates: int, *, per_layer: bool, fills: bool, seed: int) -> tuple[Blocks, Pool]:
    """Blocks, and what becomes of the pool if each is written in turn."""
    hidden, born = pool.hidden, pool.born
    if per_layer:
        born = born.expand(LAYERS, -1)
    blocks: Blocks = []
    for version in range(100, 100 + updates):
        generator = torch.Generator().manual_seed(seed + version)
        new = torch.randn(LAYERS, COUNT, WIDTH, generator=generator).to(hidden.dtype)
        if fills and not blocks:
            blocks.append((version, Block(new, None)))
            hidden = new.repeat(1, SIZE // COUNT, 1)
            born = torch.full_like(born, version)
            continue
        drawn = draw(seed, version, pool_size=SIZE, num_tokens=COUNT, num_layers=LAYERS, per_layer=per_layer)
        blocks.append((version, Block(new, drawn)))
        hidden = forget(hidden, drawn, new)
        fresh = torch.full((len(born), COUNT, 1), version, dtype=torch.int32)
        born = forget(born[..., None], drawn.expand(len(born), -1), fresh)[..., 0]
    return blocks, Pool(hidden, born)


def gathered(blob: bytes, blocks: Blocks, part: int, shape: Sequence[int] = SHAPE) -> Gathering:
    """Fed by way of a buffer that is written over, as a disk's is."""
    gathering = Gathering(shape, len(blob), blocks)
    buffer = bytearray(part)
    for begin in range(0, len(blob), part):
        piece = blob[begin : begin + part]
        buffer[: len(piece)] = piece
        gathering.feed(memoryview(buffer)[: len(piece)])
    buffer[:] = b"\xff" * part
    return gathering


def same(found: Pool, expected: Pool) -> bool:
    hidden = torch.equal(found.hidden, expected.hidden) and found.hidden.dtype == expected.hidden.dtype
    return hidden and torch.equal(*torch.broadcast_tensors(found.born, expected.born))


@settings(deadline=None)
@given(st.integers(0, 12), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**30))
def test_replay_is_forgetting_step_by_step(
    updates: int, per_layer: bool, ages_by_layer: bool, fills: bool, seed: int
) -> None:
    pool = base(LAYERS if ages_by_layer else 1)
    blocks, expected = grown(pool, updates, per_layer=per_layer, fills=fills, seed=seed)
    assert same(replay(pool, blocks), expected)
    middle = updates // 2
    assert same(replay(replay(pool, blocks[:middle]), blocks[middle:]), expected)


@settings(deadline=None)
@given(
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.one_of(st.integers(1, 200), st.integers(200, 3000)),
)
def test_a_snapshot_is_replayed_as_it_comes_in_parts_of_any_size(
    updates: int,
    per_layer: bool,
    ages_by_layer: bool,
    fills: bool,
    seed: int,
    dtype: torch.dtype,
    part: int,
) -> None:
    pool = base(LAYERS if ages_by_layer else 1, dtype)
    blocks, expected = grown(pool, updates, per_layer=per_layer, fills=fills, seed=seed)
    assert same(gathered(encode_snapshot(pool), blocks, part).pool(), expected)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("together", [1, 3, SIZE])
def test_a_pool_is_replayed_in_its_own_memory(
    monkeypatch: pytest.MonkeyPatch, together: int, per_layer: bool
) -> None:
    monkeypatch.setattr(replaying, "_MOVED", together * WIDTH * 4)
    pool = base(LAYERS if per_layer else 1)
    blocks, expected = grown(pool, 3, per_layer=per_layer, fills=False, seed=7)
    replayed = replay(pool, blocks, reuse=True)
    assert replayed.hidden.data_ptr() == pool.hidden.data_ptr()
    assert same(replayed, expected)


def test_blocks_of_another_dtype_take_the_pools() -> None:
    pool = base(1)
    blocks, _ = grown(pool, 3, per_layer=True, fills=False, seed=1)
    halves = [(version, Block(block.hidden.half(), block.forgotten)) for version, block in blocks]
    rounded = [(version, Block(block.hidden.half().float(), block.forgotten)) for version, block in blocks]
    expected = replay(pool, rounded)
    assert same(replay(pool, halves), expected)
    assert same(gathered(encode_snapshot(pool), halves, 100).pool(), expected)


def test_a_snapshots_tensors_lie_in_any_order() -> None:
    """As safetensors' own ``save`` puts them, which wrote the first snapshots."""
    pool = base(1, torch.bfloat16)
    blob = save({"memory": pool.hidden, "born": pool.born})
    assert blob.index(b'"born"') < blob.index(b'"memory"')
    blocks, expected = grown(pool, 5, per_layer=False, fills=False, seed=3)
    assert same(gathered(blob, blocks, 64).pool(), expected)


def test_a_block_of_another_shape_is_refused() -> None:
    blocks = [(1, Block(torch.zeros(LAYERS, COUNT, WIDTH + 1), torch.tensor([[0, 1, 2, 3]])))]
    with pytest.raises(FingerprintMismatch):
        replay(base(1), blocks)
    with pytest.raises(FingerprintMismatch):
        Gathering(SHAPE, 1000, blocks)


@pytest.mark.parametrize("shape", [(LAYERS, SIZE + 1, WIDTH), (LAYERS - 1, SIZE, WIDTH), (LAYERS, SIZE, 7)])
def test_a_snapshot_of_another_shape_is_refused_when_it_has_come(shape: tuple[int, ...]) -> None:
    gathering = gathered(encode_snapshot(base(1)), [], 64, shape)
    with pytest.raises(FingerprintMismatch):
        gathering.pool()


def told(blob: bytes, header: bytes) -> bytes:
    """The blob with another header."""
    return len(header).to_bytes(8, "little") + header + blob[8 + int.from_bytes(blob[:8], "little") :]


BLOB = encode_snapshot(base(1))


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        BLOB[:7],
        BLOB[:50],
        (2**60).to_bytes(8, "little") + BLOB[8:],
        bytes(8) + BLOB[8:],
        told(BLOB, b"{}"),
        told(BLOB, b"\xff" * 40),
        BLOB.replace(b"F32", b"F99"),
        BLOB.replace(b'"born"', b'"corn"'),
        told(BLOB, b'{"memory":{"dtype":"F32","shape":[3,20,6],"data_offsets":[0,99999999999]}}'),
        told(
            BLOB,
            b'{"memory":{"dtype":"F32","shape":[3,20,6],"data_offsets":[0,1440]},'
            b'"born":{"dtype":"I32","shape":[1,20],"data_offsets":[1441,1521]}}',
        ),
    ],
)
@pytest.mark.parametrize("part", [1, 64, 4096])
def test_bytes_that_are_no_snapshot_are_taken_and_never_become_a_pool(blob: bytes, part: int) -> None:
    """While they come nobody knows whether they are what was written: that they are not is for the store to say."""
    gathering = gathered(blob, [], part)
    with pytest.raises(ValueError, match="no snapshot"):
        gathering.pool()


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_is_fed_raises_nothing(data: st.DataObject) -> None:
    blocks, _ = grown(base(1), 2, per_layer=False, fills=False, seed=1)
    blob = bytearray(BLOB)
    for _ in range(data.draw(st.integers(1, 4))):
        # most of them in the header
        at = data.draw(st.one_of(st.integers(0, 160), st.integers(0, len(blob) - 1)))
        blob[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(blob) + 40))
    gathered(bytes(blob)[:cut] + bytes(max(0, cut - len(blob))), blocks, data.draw(st.integers(1, 2000)))
